"""The MLflow flavours of a registered retriever: sentence_transformers, and a pyfunc that knows queries from passages.

Both are in one model version over one copy of the weights: MLflow keeps flavours side by side, and a pyfunc is only a
module that loads what another flavour saved. MLflow's own pyfunc of sentence_transformers passes `params` on to `encode`,
so a consumer would have to know the names of prompts; ours takes `kind`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature
    from sentence_transformers import SentenceTransformer

CODE = Path(__file__).with_name("nvr_retriever_v1.py")
EXAMPLE = ["what is a hard negative?", "how are they mined?"]


def signature(dim: int) -> ModelSignature:
    """A column of texts in, vectors [n, dim] out, and the param `kind`."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, dim))]),
        params=ParamSchema([ParamSpec("kind", DataType.string, "query")]),
    )


def save_model(path: str, model: SentenceTransformer, mlflow_model: Model, **settings: Any) -> None:
    """What `mlflow.models.Model.log(flavor=…)` calls: MLflow's sentence_transformers flavour, with our pyfunc."""
    import mlflow
    from mlflow.models.model import MLMODEL_FILE_NAME

    mlflow.sentence_transformers.save_model(model, path, mlflow_model=mlflow_model, code_paths=[str(CODE)], **settings)
    mlflow_model.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.MAIN] = CODE.stem
    mlflow_model.flavors["sentence_transformers"]["code"] = None  # that flavour loads without a line of ours
    mlflow_model.save(str(Path(path) / MLMODEL_FILE_NAME))
