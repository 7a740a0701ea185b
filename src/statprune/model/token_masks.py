"""Which attention mask marks the padding of a tensor, read off the graph."""

from collections.abc import Sequence

from torch.fx import Node

from statprune.model.nodes import is_number, shape_of


class TokenMasks:
    """Which attention mask, if any, marks the padding of a tensor.

    A mask [batch, length] speaks for the tensors that depend on an input of the same batch and length; in an
    encoder-decoder, what depends on a decoder input has the decoder's mask.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.sources: dict[Node, frozenset[str]] = {}
        for node in nodes:
            own = {str(node.target)} if node.op == "placeholder" else set()
            # Sizes do not count: a traced encoder may well read its batch size from a decoder input.
            read = [] if is_number(node) else node.all_input_nodes
            self.sources[node] = frozenset(own).union(*(self.sources[source] for source in read))
        placeholders = {str(node.target): shape_of(node) for node in nodes if node.op == "placeholder"}
        self.companions = {
            mask: {
                name
                for name, other in placeholders.items()
                # Tokens are [batch, length] or [batch, length, channels]; an image of 4 dimensions has no such mask.
                if len(other) <= 3 and other[:2] == shape and name != mask and _is_decoders(name) == _is_decoders(mask)
            }
            for mask, shape in placeholders.items()
            if mask.endswith("attention_mask") and len(shape) == 2
        }

    def of(self, tensor: Node) -> str | None:
        """The name of the mask."""
        sources = self.sources[tensor]
        in_decoder = any(_is_decoders(name) for name in sources)
        for mask, companions in self.companions.items():
            if _is_decoders(mask) == in_decoder and companions & sources:
                return mask
        return None


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder_")
