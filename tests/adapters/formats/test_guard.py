"""Files that were made to do harm, one test a trick: refused with the reason, before anything of them is used."""

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from loragraft.adapters.checkpoint import load_adapter
from loragraft.adapters.formats.guard import checked_name
from loragraft.quantization.tensor_file import CheckpointError

Save = Callable[..., Path]
DOWN, UP = "transformer.proj_out.lora_A.weight", "transformer.proj_out.lora_B.weight"


class Marked:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    tensors = {DOWN: torch.ones(2, 8), UP: torch.ones(8, 2)}
    bare = len(save(tensors, {"note": ""})) - sum(tensor.nbytes for tensor in tensors.values()) - 8
    file = tmp_path / "lora.safetensors"
    file.write_bytes(save(tensors, {"note": "x" * (length - bare)}))
    assert file.read_bytes()[:2] == length.to_bytes(2, "little")
    assert list(load_adapter(file).pairs) == ["proj_out"]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str, writer: str) -> None:
    file, mark = tmp_path / f"lora{suffix}", tmp_path / "mark"
    if writer == "torch":
        torch.save({"x": Marked(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Marked(mark)))
    with pytest.raises(CheckpointError, match=r"pickle|zip archive"):
        load_adapter(file)
    assert not mark.exists()


def header_file(path: Path, header: bytes, announced: int | None = None) -> Path:
    path.write_bytes((len(header) if announced is None else announced).to_bytes(8, "little") + header + bytes(64))
    return path


def test_giant_headers_are_not_read(tmp_path: Path) -> None:
    """Announced only, and really there (17 MiB of spaces)."""
    with pytest.raises(CheckpointError, match="hostile one: it announces a header of 9223372036854775807 bytes"):
        load_adapter(header_file(tmp_path / "a.safetensors", b"{}", 2**63 - 1))
    with pytest.raises(CheckpointError, match="hostile one: it announces a header of 17825792 bytes"):
        load_adapter(header_file(tmp_path / "b.safetensors", b"{" + b" " * (17 * 2**20 - 2) + b"}"))


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b'{"__metadata__": {"x": {}}}', b'{"a": {"data_offsets": [-8, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}', b"\xff\xfe", b"[" * 100_000],
)  # fmt: skip
def test_crooked_headers(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"not a safetensors file|cannot be read"):
        load_adapter(header_file(tmp_path / "lora.safetensors", header))


def test_truncated(draw, save: Save) -> None:
    file = save({DOWN: draw(2, 8), UP: draw(6, 2)})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"truncated: tensor '{UP}'"):
        load_adapter(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [DOWN, UP, "transformer.proj_out.alpha", "text_encoder.x.lora_A.weight"])
def test_values_that_are_no_numbers(draw, save: Save, value: float, where: str) -> None:
    """One value among many, in text encoders too."""
    tensors = {DOWN: draw(2, 8), UP: draw(6, 2)} | {"text_encoder.x.lora_B.weight": draw(4, 2)}
    tensors |= {"transformer.proj_out.alpha": torch.tensor(2.0), "text_encoder.x.lora_A.weight": draw(2, 4)}
    tensors[where].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"'{where}' holds NaN or infinity"):
        load_adapter(save(tensors))


def test_values_of_eight_bits(draw, save: Save) -> None:
    """float8 factors are read as bfloat16; a NaN among them is seen."""
    tensors = {DOWN: draw(2, 8).to(torch.float8_e4m3fn), UP: draw(6, 2).to(torch.float8_e4m3fn)}
    down, _ = load_adapter(save(tensors)).pairs["proj_out"]
    assert down.dtype == torch.bfloat16 and torch.equal(down, tensors[DOWN].to(torch.bfloat16))
    tensors[UP].view(torch.uint8)[0, 0] = 0x7F
    with pytest.raises(CheckpointError, match="NaN"):
        load_adapter(save(tensors, name="nan"))


@pytest.mark.parametrize(
    "key", ["../../etc/x.lora_A.weight", "/root/x.lora_A.weight", "transformer...x.lora_A.weight", "a\\b.lora_A.weight", "a\x1b[2J.lora_A.weight", "x" * 400]
)  # fmt: skip
def test_tensor_names_that_are_paths(draw, save: Save, key: str) -> None:
    with pytest.raises(CheckpointError, match="is a path or no name at all"):
        load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2), key: draw(2, 8)}))


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", "a\\b", "..", ".hidden", "x\x00", "", "a..b", "C:", "n" * 101, 3, None, {}]
)
def test_adapter_names_that_are_paths(name: object) -> None:
    with pytest.raises(CheckpointError, match="no plain name"):
        checked_name(Path("lora.safetensors"), name)


def test_an_adapter_name_in_the_header_that_is_a_path(draw, save: Save) -> None:
    header = {"loragraft": json.dumps({"name": "../../.ssh/authorized_keys"})}
    with pytest.raises(CheckpointError, match=r"names the adapter '\.\./\.\./\.ssh"):
        load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2)}, header))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ([], "'loragraft' in its metadata is not a JSON object"),
        ({"base": 3}, "loragraft.base in its metadata is '3', expected str"),
        ({"recipe": "x"}, "'recipe' in its metadata is not a JSON object"),
        (
            {"recipe": {"sample": {"prompts": "x"}}},
            "recipe.sample.prompts in its metadata is 'x', expected list of str",
        ),
        (
            {"recipe": {"sample": {"guidance": 1e999}}},
            "recipe.sample.guidance in its metadata is 'inf', expected float",
        ),
        ({"recipe": {"data": {"resolutions": [64, True]}}}, "expected list of int"),
    ],
)
def test_metadata_of_other_types(draw, save: Save, block: object, reason: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2)}, {"loragraft": json.dumps(block)}))


def test_regular_expressions_of_a_stranger_are_not_run(draw, save: Save) -> None:
    """PEFT matches rank_pattern's keys as such: this one takes 2^40 steps."""
    fields = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"(p+)+" * 5 + "x": 4}}
    with pytest.raises(CheckpointError, match="alpha_pattern of the file's configuration is no list of module names"):
        load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2)}, {"lora_adapter_metadata": json.dumps(fields)}))


def test_bytes_changed_at_random(draw, save: Save) -> None:
    """150 damaged headers: each is read or refused with a sentence, nothing else is raised."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": draw(2, 8),
        f"{name}.lora_up.weight": draw(24, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    file = save(tensors, {"loragraft": json.dumps({"name": "a", "recipe": {"sample": {"prompts": ["x"]}}})})
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(3)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 4))):
            damaged[chance.randrange(8, length)] = chance.choice(b'0123456789"[]{},:.-e\\/_a\x00\xff')
        file.write_bytes(damaged)
        try:
            load_adapter(file)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_shapes_that_do_not_belong_together(draw, save: Save) -> None:
    for name, up in {"ranks": draw(6, 3), "kernel": draw(6, 2, 3, 3), "vector": draw(2)}.items():
        with pytest.raises(CheckpointError, match=r"'proj_out' has (A|B)"):
            load_adapter(save({DOWN: draw(2, 8), UP: up}, name=name))


def test_a_number_of_blocks_that_would_fill_the_memory(draw, save: Save) -> None:
    with pytest.raises(CheckpointError, match="belong to no base known here"):
        load_adapter(save(draw.lora("lora_unet_double_blocks_999999999_img_attn_proj", 8, 8)))


def test_compressed_bombs_have_no_place(draw, save: Save) -> None:
    """A header of PEFT's that is deep, or no object."""
    for text, reason in (
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"transformer.r": "x"}', "configuration says x"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2)}, {"lora_adapter_metadata": text}))


def test_small_factors_of_giant_products(draw, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kronecker product of vectors is as large as one likes: its size is checked before it is formed."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {"lokr_w1_a": draw(600, 1), "lokr_w1_b": draw(1, 2), "lokr_w2_a": draw(600, 1), "lokr_w2_b": draw(1, 2)}
    with pytest.raises(CheckpointError, match="update of 4 inputs and 360000 outputs"):
        load_adapter(save({f"{name}.{part}": tensor for part, tensor in parts.items()}))
    monkeypatch.setattr("loragraft.adapters.formats.reading.MOST_NUMBERS", 27)
    with pytest.raises(CheckpointError, match="expands to more than 27 numbers"):
        load_adapter(save({DOWN: draw(2, 8), UP: draw(6, 2)}, name="many"))


def test_a_scale_beyond_all_numbers(draw, save: Save) -> None:
    tensors = {DOWN: draw(2, 8), UP: draw(6, 2), "transformer.proj_out.alpha": torch.tensor(3e38)}
    with pytest.raises(CheckpointError, match="not finite once its scale is in it"):
        load_adapter(save({**tensors, UP: tensors[UP] * 1e10}))
