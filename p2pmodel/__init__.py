"""p2pmodel: a peer-to-peer network that hosts, serves, trains and merges a model between volunteers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pmodel.node.asking.distributed import DistributedModelForCausalLM as DistributedModelForCausalLM

__version__ = "0.1.0"
__all__ = ["DistributedModelForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    """torch and transformers are loaded only by those who ask for them."""
    if name == "DistributedModelForCausalLM":
        from p2pmodel.node.asking.distributed import DistributedModelForCausalLM

        return DistributedModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
