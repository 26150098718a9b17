"""Sounds: checked like images, and given to models that hear, here the thinker with the processor of Qwen2-Audio."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch  # noqa: TID253

sys.path.insert(0, str(Path(__file__).parent / "data"))

from data_helpers import sentence, write_beir

from nvr_tasks import tiny_models
from nvr_tasks.data import media_files
from nvr_tasks.data.beir import read_beir
from nvr_tasks.data.media_files import MediaFiles
from nvr_tasks.encoding import Encoder
from nvr_tasks.errors import NvrError
from nvr_tasks.media import refer, refuse_unread
from nvr_tasks.models import load_folder
from nvr_tasks.settings import Architecture

OMNI: Architecture = "qwen2_5_omni"


def sound(pitch: float, kind: str = "WAV", seconds: float = 1.0, rate: int = 8000) -> bytes:
    out = io.BytesIO()
    samples = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    soundfile.write(out, samples.astype(np.float32), rate, format=kind)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "ending"), [("WAV", "wav"), ("FLAC", "flac"), ("MP3", "mp3")])
def test_a_data_set_keeps_sounds(tmp_path: Path, kind: str, ending: str) -> None:
    folder = write_beir(tmp_path / "set")
    rows = (folder / "corpus.jsonl").read_text().splitlines()
    rows[0] = '{"_id": "d0", "audio": "a.wav"}'  # whatever its name says
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "a.wav").write_bytes(sound(440, kind))
    data = read_beir(folder, "here", MediaFiles(tmp_path / "kept"))
    assert data.documents["d0"] == ("", "")
    assert data.media["d0"].endswith(f".{ending}")
    assert (tmp_path / "kept" / data.media["d0"]).read_bytes() == sound(440, kind)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no sound", "is no WAV, FLAC or MP3 file, or it is damaged"),
        (sound(440, "OGG"), "is OGG .*, and WAV, FLAC or MP3 is read"),
        (sound(440, "FLAC")[:2000], "is cut off|is damaged"),
        (sound(440, seconds=3), "is longer than 2 seconds"),
    ],
)
def test_a_bad_sound_is_refused(tmp_path: Path, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_files, "MAX_SECONDS", 2)
    with pytest.raises(NvrError, match=rf"row: audio.*(?:{words})"):
        MediaFiles(tmp_path).keep({"audio": content}, "row", Path)


def test_a_sound_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_files, "MAX_SAMPLES", 15_000)
    with pytest.raises(NvrError, match=r"row: audio.*would unpack to more than 15,000 samples"):
        MediaFiles(tmp_path).keep({"audio": sound(440, "FLAC", seconds=2)}, "row", Path)


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    folder = tmp_path_factory.mktemp("hearing")
    tokenizer = tiny_models._tokenizer(tiny_models.OMNI_TOKENS)
    torch.manual_seed(1)
    tiny_models.omni_thinker(tokenizer).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=tiny_models.MEL_BINS, chunk_length=2)
    Qwen2AudioProcessor(extractor, tokenizer, chat_template=tiny_models.OMNI_TEMPLATE).save_pretrained(folder)
    return load_folder(folder, "cpu")


def test_vectors_are_those_of_sentence_transformers(hearing: Any, tmp_path: Path) -> None:
    kept = MediaFiles(tmp_path)
    low, high = (kept.keep({"audio": sound(pitch)}, "row", Path) for pitch in (300, 900))
    seen = [refer(low, ""), refer(high, ""), refer(high, "a caption"), sentence(1)]
    refuse_unread("the teacher", hearing, [("sounds", text) for text in seen])
    made = Encoder(hearing, torch.float32, files=tmp_path).encode(seen, "passage: ", 96)
    hearing.max_seq_length = 96
    inputs: list[Any] = [
        {"audio": str(tmp_path / low)},
        {"audio": str(tmp_path / high)},
        {"audio": str(tmp_path / high), "text": "a caption"},
        sentence(1),
    ]
    expected = np.stack([hearing.encode(i, prompt="passage: ", normalize_embeddings=True) for i in inputs])
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert np.abs(made[0] - made[1]).max() > 1e-3, "another pitch"
    with pytest.raises(NvrError, match="the teacher reads text, audio only, but 1 texts of source scans have images"):
        refuse_unread("the teacher", hearing, [("scans", refer(f"image/{'a' * 64}.png", ""))])
