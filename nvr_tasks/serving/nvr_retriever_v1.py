"""How a registered retriever answers as an MLflow pyfunc. This file travels inside the model: it imports nothing of NVR.

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict(["how do I sort an array?"], params={"kind": "query"})      # float32 [n, D]

`kind` says which of the model's own prompts and settings apply: `query` (the default) or `passage`.
"""

from __future__ import annotations

from typing import Any

KINDS = ("query", "passage")
NULLS = ("None", "nan", "<NA>")  # how pandas spells what is not there


class Retriever:
    """Embeds queries and passages, each with its prompt."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_raw_model(self) -> Any:
        """The sentence-transformers model."""
        return self.model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Vectors, float32 [n, D], of texts: a list, a column, or a table with one column.

        Raises:
            MlflowException: `kind` is neither query nor passage, or an input is no text. Of this kind of error alone
                MLflow's scoring server tells the client the message (status 400).
        """
        kind = (params or {}).get("kind", "query")
        if kind not in KINDS:
            raise _refused(f"kind is {kind!r}: one of {', '.join(KINDS)}")
        if hasattr(model_input, "iloc"):  # MLflow makes tables of lists
            model_input = model_input.iloc[:, 0] if model_input.ndim == 2 else model_input
        texts = [model_input] if model_input is None or isinstance(model_input, str) else list(model_input)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                what = "missing" if repr(text) in NULLS else f"{text!r:.80}"
                raise _refused(f"input {row} (from 0) is {what}: a text is wanted")
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        given: list[Any] = [str(text) for text in texts]
        if set(getattr(self.model, "modalities", ())) - {"text", "message"}:
            given = [
                {"text": text} for text in given
            ]  # a bare text that names an image would be fetched, or read from disk
        return encode(given, show_progress_bar=False)


def _refused(message: str) -> Exception:
    from mlflow.exceptions import MlflowException

    refusal: Exception = MlflowException.invalid_parameter_value(message)
    return refusal


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Retriever:
    """MLflow's entry point; `path` is the sentence-transformers folder."""
    del model_config
    from sentence_transformers import SentenceTransformer

    return Retriever(SentenceTransformer(path, trust_remote_code=False, local_files_only=True))
