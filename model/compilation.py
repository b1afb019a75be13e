"""torch.compile of the parts that dominate a step: fewer, larger kernels, and the same numbers up to rounding."""

from typing import Any

from torch import nn

from isthmus.model.config import CompiledParts


def compile_parts(model: Any, parts: CompiledParts, backend: str = "inductor") -> None:
    """Compile the frozen image encoder (`vision`), or the Q-Former's layers too (`all`), in place.

    Parameter names stay as they are. Images come in one shape; the shapes of packed text change with every batch, so
    the layers are compiled with sizes that vary, which torch does on its own at the second shape.
    """
    if parts != "none" and model.vision is not None:
        model.vision.network.compile(backend=backend, dynamic=False)
    if parts == "all":
        for layer in model.qformer.layers:
            assert isinstance(layer, nn.Module)
            layer.compile(backend=backend)
