"""What transformers share: an embedding, a stack of like blocks along one stream, and a head.

A part of such a model can be run by itself, which is all that a pipeline of several processes needs of it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# Makes something of the last stream and the matrix that turns it into logits, or of logits and None.
Finish = Callable[[Tensor, Tensor | None], Tensor]


class Stack(nn.Module):
    """inputs -> `embed` -> `blocks` -> `head` -> logits. Subclasses define the three and the shape of the stream.

    Attributes:
        blocks: they map the stream to a stream of the same shape.
        embed_names: attributes (modules, parameters) that `embed` uses.
        head_names: attributes that `head` uses; one that both use (tied embeddings) is in both.
    """

    blocks: nn.ModuleList
    embed_names: tuple[str, ...] = ()
    head_names: tuple[str, ...] = ()

    def embed(self, inputs: Tensor) -> Tensor:
        """The stream that enters the first block."""
        raise NotImplementedError

    def beside(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What each block needs beside the stream (positions, masks); it follows from the inputs alone."""
        return ()

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Logits of the stream that leaves the last block."""
        raise NotImplementedError

    def ends(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The normed stream and the matrix of the head, where the head is a plain product; else logits and None."""
        return self.head(x, inputs), None

    def stream(self, inputs: Tensor) -> tuple[int, ...]:
        """Shape of the stream for these inputs."""
        raise NotImplementedError

    def forward(
        self,
        inputs: Tensor,
        x: Tensor | None = None,
        span: tuple[int, int] | None = None,
        finish: Finish | None = None,
    ) -> Tensor:
        """Map inputs to logits; or do a part of it, the blocks of a span.

        Args:
            inputs: the model's inputs, as its class says.
            x: the stream that enters the span; not used where the span begins with the first block.
            span: the first block and the one after the last; None is all of them.
            finish: what to do in place of the logits, such as a loss that never holds all of them.

        Returns:
            The stream that leaves the span; or, where that ends with the last block, the logits or what `finish` gives.
        """
        first, end = span or (0, len(self.blocks))
        if first == 0:
            x = self.embed(inputs)
        assert x is not None
        beside = self.beside(inputs)
        for index in range(first, end):
            x = self.blocks[index](x, *beside)
        if end < len(self.blocks):
            return x
        return self.head(x, inputs) if finish is None else finish(*self.ends(x, inputs))
