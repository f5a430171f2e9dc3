"""A FLUX.1 pipeline small enough for a CPU: every part of a diffusers folder, with tokenizers that were never trained."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from loragraft.backbones.flux1 import flux1_scheduler
from loragraft.backbones.load import load_backbone
from loragraft.recipes.schema import WeightsConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def _tokenizer(mark: str, length: int, folder: Path, *, first: bool = False) -> PreTrainedTokenizerFast:
    """One token a letter; spaces are dropped. Offsets and the mark at the end (or `first`) are those of the real ones."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", mark, "<unk>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split("", "isolated")]
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A" if first else f"$A {mark}", special_tokens=[(mark, 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token=mark, unk_token="<unk>", model_max_length=length
    )
    made.save_pretrained(folder)
    return made


def tiny_transformer(*, guidance: bool = True, in_channels: int = 64) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=64,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def write_pipeline(folder: Path, *, kind: str = "dev") -> Path:
    """What `FluxPipeline.save_pretrained` writes, in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=77, eos_token_id=1, bos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
            )
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**flux1_scheduler("dev" if kind == "dev" else "schnell")),
            vae=tiny_vae(),
            text_encoder=clip,
            tokenizer=_tokenizer("<end>", 77, folder / "tokenizer"),
            text_encoder_2=t5,
            tokenizer_2=_tokenizer("</s>", 512, folder / "tokenizer_2"),
            transformer=tiny_transformer(guidance=kind == "dev"),
        )
    for part in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        nn.Module.to(getattr(pipeline, part), torch.bfloat16)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 [dev], guidance-distilled."""
    return write_pipeline(tmp_path_factory.mktemp("models") / "FLUX.1-tiny")


@pytest.fixture(scope="session")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a guidance embedding."""
    return write_pipeline(tmp_path_factory.mktemp("models") / "FLUX.1-tiny-schnell", kind="schnell")


@pytest.fixture(scope="session")
def tiny_unets(module_of: Callable[[Path, str], ModuleType]) -> ModuleType:
    """`tiny_unets.py`."""
    return module_of(Path(__file__).with_name("tiny_unets.py"), "tiny_unets")


@pytest.fixture(scope="session")
def unet_folder(tiny_unets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a UNet base -> a tiny pipeline of its kind."""
    root, made = tmp_path_factory.mktemp("unets"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_unets.write_pipeline(root / name, name)
        return made[name]

    return folder


@contextmanager
def one_round() -> Iterator[None]:
    """One round and one candidate: what a tiny model is quantized with where its quality does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loragraft.backbones.architectures.FOLDER_ROUNDS", 1)
        patch.setattr("loragraft.backbones.architectures.DATA_FREE_GRID", 1)
        yield


@pytest.fixture(scope="module")
def quick_quantizer() -> Iterator[None]:
    """`one_round` until the end of the module that asks for it, and no further."""
    with one_round():
        yield


@pytest.fixture(scope="session")
def flux_cache(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache root in which `flux_folder` is quantized already, in profile native."""
    root = tmp_path_factory.mktemp("cache")
    with one_round():
        load_backbone("flux1-dev", "native", "cpu", root, WeightsConfig(path=str(flux_folder)))
    return root


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )


def tiny_dc_ae() -> AutoencoderDC:
    """f32c32 with SANA's scale, narrow."""
    kinds, scales = ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2, [[], [], [], [], [5], [5]]
    widths = (8, 8, 8, 8, 16, 32)
    return AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip


def tiny_sana() -> SanaTransformer2DModel:
    """Two blocks of width 64; the feed-forward part is 160 wide inside, which is no multiple of a group."""
    return SanaTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=32,
        cross_attention_dim=64, caption_channels=64,
    )  # fmt: skip


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, cross_attention_dim=64, caption_channels=64,
        interpolation_scale=2, use_additional_conditions=False,
    )  # fmt: skip


def _in_bfloat16(pipeline: SanaPipeline | PixArtSigmaPipeline, folder: Path) -> Path:
    for part in ("vae", "text_encoder", "transformer"):
        nn.Module.to(getattr(pipeline, part), torch.bfloat16)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `SanaPipeline.save_pretrained` writes, tiny."""
    folder = tmp_path_factory.mktemp("models") / "sana-tiny"
    gemma = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        pipeline = SanaPipeline(
            tokenizer=_tokenizer("<bos>", 2048, folder / "tokenizer", first=True),
            text_encoder=Gemma2Model(gemma),
            vae=tiny_dc_ae(),
            transformer=tiny_sana(),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )
    return _in_bfloat16(pipeline, folder)


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `PixArtSigmaPipeline.save_pretrained` writes, tiny."""
    folder = tmp_path_factory.mktemp("models") / "pixart-tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipeline = PixArtSigmaPipeline(
            tokenizer=_tokenizer("</s>", 512, folder / "tokenizer"),
            text_encoder=tiny_t5(),
            vae=AutoencoderKL(
                block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
                sample_size=64, scaling_factor=0.13025,
            ),
            transformer=tiny_pixart(),
            scheduler=DPMSolverMultistepScheduler(),
        )  # fmt: skip
    return _in_bfloat16(pipeline, folder)


@pytest.fixture(scope="session")
def encoded_on_a_gpu() -> Callable[[Callable[[], Any]], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(makes encoders) -> (latents of two grey pictures, text of two captions), once each encoder has left the GPU again."""

    def encoded(make: Callable[[], Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for _ in range(2):  # the first time leaves what cuBLAS keeps, and is not compared
            gc.collect()
            before = torch.cuda.memory_allocated()
            encoders = make()
            assert torch.cuda.memory_allocated() == before
            latents = encoders.encode_images(torch.zeros(2, 3, 64, 64)).cpu()
            assert encoders.vae.device.type == "cuda"
            text = encoders.encode_text(["a white heart", ""])
            assert encoders.vae.device.type == "cpu"
            assert not any(tensor.is_cuda for tensor in text.values())
            encoders.release_text()
        assert torch.cuda.memory_allocated() == before
        return latents, text

    return encoded
