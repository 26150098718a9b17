"""The pyfunc of a registered model: what it refuses, in words that MLflow's scoring server passes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from nvr_tasks.serving.nvr_retriever_v1 import Retriever


class Echo:
    """Stands in for a model: says what it was asked."""

    def encode_query(self, texts: list[str], **_: Any) -> tuple[str, list[str]]:
        return "query", texts

    def encode_document(self, texts: list[str], **_: Any) -> tuple[str, list[str]]:
        return "passage", texts


@pytest.mark.parametrize(
    "given",
    [
        "a",
        ["a"],
        np.array(["a"]),
        pd.Series(["a"]),
        pd.DataFrame({"x": ["a"]}),
        pd.DataFrame({0: ["a"]}, dtype="string"),
    ],
)
def test_texts_come_in_any_shape(given: Any) -> None:
    assert Retriever(Echo()).predict(given) == ("query", ["a"])
    assert Retriever(Echo()).predict(given, {"kind": "passage"}) == ("passage", ["a"])


@pytest.mark.parametrize(
    ("given", "params", "said"),
    [
        (["a"], {"kind": "doc"}, "kind is 'doc': one of query, passage"),
        (None, {}, "input 0 (from 0) is missing: a text is wanted"),
        (pd.DataFrame({0: ["a", None]}), {}, "input 1 (from 0) is missing: a text is wanted"),
        (pd.Series(["a", None], dtype="string"), {}, "input 1 (from 0) is missing: a text is wanted"),
        (["a", 7], {}, "input 1 (from 0) is 7: a text is wanted"),
        (pd.Series(["a", float("nan")], dtype=object), {}, "input 1 (from 0) is missing: a text is wanted"),
    ],
)
def test_what_is_no_text_or_kind_is_refused_as_the_clients_fault(given: Any, params: dict[str, Any], said: str) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as raised:
        Retriever(Echo()).predict(given, params)
    assert (raised.value.message, raised.value.get_http_status_code()) == (said, 400)
