"""The answers to a prompt as a trie: a prefix that several sequences share is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Token sequences laid out as one trie of T nodes, a parent always before its children.

    tokens: (T,) the token id of each node.
    depth: (T,) the position of a node in the sequences that it belongs to.
    same_path: (T, T) bool, whether two nodes are the same or one is an ancestor of the other.
    paths: for every sequence the nodes of its tokens, (length,).
    """

    tokens: Tensor
    depth: Tensor
    same_path: Tensor
    paths: list[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


def pack(sequences: list[list[int]]) -> Pack:
    """Lay out sequences of token ids as a trie, in which a common prefix occurs once."""
    children: list[dict[int, int]] = []
    roots: dict[int, int] = {}
    tokens: list[int] = []
    depth: list[int] = []
    branches: list[tuple[int, int]] = []  # first node of what a sequence adds, its parent or -1
    paths: list[Tensor] = []
    for sequence in sequences:
        level, parent, path = roots, -1, []
        known = len(tokens)
        for position, token in enumerate(sequence):
            if token not in level:
                if len(tokens) == known:
                    branches.append((known, parent))
                level[token] = len(tokens)
                tokens.append(token)
                depth.append(position)
                children.append({})
            parent = level[token]
            level = children[parent]
            path.append(parent)
        paths.append(torch.tensor(path, dtype=torch.long))
    ancestor = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for begin, parent in branches:
        ancestor[begin:, :begin] = ancestor[parent, :begin] if parent >= 0 else False
    return Pack(
        torch.tensor(tokens, dtype=torch.long),
        torch.tensor(depth, dtype=torch.long),
        ancestor | ancestor.T,
        paths,
    )
