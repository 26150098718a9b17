"""Texts to vectors, as fast as the machine allows: real lengths, full batches, no core waiting for another.

Texts are tokenised once (ahead, in the background), sorted by length and cut into batches by tokens, so that little is
padding. On a CPU every core runs batches of its own, which wastes none on waiting for the others; on GPUs every
device does. None of this changes a vector beyond the rounding of sums.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: TID253 - only what runs a model imports this module
from torch import nn  # noqa: TID253

from nvr_tasks.errors import NvrError
from nvr_tasks.media import inputs_of, modality_of, more_than_text, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float32]
Features = Mapping[str, Any]  # what the tokenizer gives: tensors [n, L], and settings
Request = tuple[tuple[str, ...], str, int]  # texts, prompt, longest input


BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


class Encoder:
    """A model that embeds texts.

    Args:
        model: a sentence-transformers model; it is changed, so it should not be used for anything else.
        dtype: float32, or the type of products (weights of linear layers, attention); sums, norms and pooling stay in
            float32, which keeps the cosine with float32 vectors above 0.999.
        batch_tokens: tokens per batch, padding included; by default what fits a core's cache, or fills a GPU.
        every_gpu: use copies of it on all other GPUs, too, for when no other task runs on this machine.
        files: folder of the images and sounds that texts refer to (`nvr_tasks.media`); without it there are no references.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        dtype: torch.dtype,
        batch_tokens: int | None = None,
        *,
        every_gpu: bool = True,
        files: Path | None = None,
    ) -> None:
        self.mixed, self.given = more_than_text(model), inputs_of(model, files)
        self.dtype, self.batch_tokens = dtype, batch_tokens or BATCH_TOKENS[model.device.type]
        if dtype != torch.float32:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)  # else autocast would do so in every batch
        self.models = [model.eval()]
        if model.device.type == "cuda" and every_gpu:
            others = range(1, torch.cuda.device_count())
            self.models += [copy.deepcopy(model).to(f"cuda:{i}") for i in others]
        self.tokenizer = ThreadPoolExecutor(1)  # one at a time: it keeps its settings in itself
        self.ahead: dict[Request, Future[Features]] = {}

    def prepare(self, texts: Sequence[str], prompt: str, max_tokens: int) -> None:
        """Begin to tokenise texts that will be encoded next."""
        if self.mixed:  # pixels of a whole part are too many to hold
            return
        wanted = (tuple(texts), prompt, max_tokens)
        self.ahead[wanted] = self.tokenizer.submit(self._tokenise, *wanted)

    def _tokenise(self, texts: tuple[str, ...], prompt: str, max_tokens: int) -> Features:
        model = self.models[0]
        model.max_seq_length = max_tokens
        features: Features = model.preprocess(list(texts), prompt=prompt or None)
        return features

    def encode(self, texts: Sequence[str], prompt: str, max_tokens: int) -> Vectors:
        """Unit vectors, float32 [n, D], of at least one text, each cut at `max_tokens`, prompt included.

        Raises:
            NvrError: an image or sound takes more tokens than `max_tokens`, or the model cannot read it.
        """
        if self.mixed:
            return self._encode_mixed(texts, prompt, max_tokens)
        wanted = (tuple(texts), prompt, max_tokens)
        ahead = self.ahead.pop(wanted, None) or self.tokenizer.submit(self._tokenise, *wanted)
        features = ahead.result()
        lengths = features["attention_mask"].sum(dim=1)
        order = torch.argsort(lengths, descending=True, stable=True)
        batches = [order[start:end] for start, end in cut(lengths[order].tolist(), self.batch_tokens)]
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(batches)

        def run(number: int, model: SentenceTransformer) -> None:
            rows = batches[number]
            chosen = _rows(features, rows, int(lengths[rows[0]]), model.tokenizer.padding_side == "left")
            vectors[number] = self._forward(model, chosen)

        self._spread(run, len(batches))
        found: Vectors = torch.cat([v.cpu() for v in vectors])[torch.argsort(order)].numpy()
        return found

    def _encode_mixed(self, texts: Sequence[Any], prompt: str, max_tokens: int) -> Vectors:
        """By a model that reads more than text, and has tensors that are not one row per text: padded by the library itself."""
        modalities = [modality_of(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: (str(modalities[i]), len(texts[i])))
        size = max(1, self.batch_tokens // max_tokens)
        batches: list[list[int]] = []
        for row in order:  # of one modality each: a model without chat template takes no others
            if not batches or len(batches[-1]) == size or modalities[batches[-1][0]] != modalities[row]:
                batches.append([])
            batches[-1].append(row)
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(batches)

        def run(number: int, model: SentenceTransformer) -> None:
            chosen = [texts[i] for i in batches[number]]
            features = self.tokenizer.submit(self._preprocess, chosen, prompt, max_tokens).result()
            vectors[number] = self._forward(model, features)

        self._spread(run, len(batches))
        found: Vectors = torch.cat([v.cpu() for v in vectors])[torch.argsort(torch.tensor(order))].numpy()
        return found

    def _preprocess(self, texts: Sequence[Any], prompt: str, max_tokens: int) -> Features:
        model = self.models[0]
        model.max_seq_length = max_tokens
        try:
            features: Features = model.preprocess([self.given(text) for text in texts], prompt=prompt or None)
        except (ValueError, OSError, RuntimeError) as error:
            if len(texts) > 1:
                for text in texts:  # one of them is at fault, and is named
                    self._preprocess([text], prompt, max_tokens)
            raise NvrError(
                f"{shown(str(texts[0]))[:120]!r} cannot be given to the model: {error}; at most {max_tokens:,} tokens were allowed: "
                "raise max_tokens, or remove it"
            ) from error
        return features

    @torch.inference_mode()
    def _forward(self, model: SentenceTransformer, features: Features) -> torch.Tensor:
        device = model.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
        mixed: AbstractContextManager[Any] = (
            nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)
        )
        with mixed:
            out: torch.Tensor = model(moved)["sentence_embedding"]
        return nn.functional.normalize(out.float(), dim=1)

    def _spread(self, run: Any, count: int) -> None:
        """Run all batches, on every device or, on a CPU, on as many threads as torch may use."""
        on_cpu = self.models[0].device.type == "cpu"
        workers = min(count, torch.get_num_threads() if on_cpu else len(self.models))
        if workers <= 1:
            for number in range(count):
                run(number, self.models[0])
            return
        numbers = iter(range(count))
        taking = threading.Lock()

        def work(worker: int) -> None:
            if on_cpu:
                torch.set_num_threads(1)
            while True:
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                run(number, self.models[0 if on_cpu else worker])

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(work, range(workers)))
            finally:
                torch.set_num_threads(threads)


def cut(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cut lengths, sorted downwards, into ranges of at most `budget` when all are padded to the first; at least one each."""
    ranges = []
    start = 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, budget // max(1, lengths[start])))
        ranges.append((start, end))
        start = end
    return ranges


def _rows(features: Features, rows: torch.Tensor, length: int, padded_left: bool) -> Features:
    """Some rows, without the padding that none of them needs."""
    width = features["attention_mask"].shape
    columns = slice(-length, None) if padded_left else slice(length)
    chosen = {}
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and value.shape[:2] == width:
            chosen[name] = value[rows][:, columns]
        elif isinstance(value, torch.Tensor) and value.shape[:1] == width[:1]:
            chosen[name] = value[rows]
        else:
            chosen[name] = value
    return chosen
