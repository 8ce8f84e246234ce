"""Shard a base that does not fit on one GPU among the ranks of a node (torch's FSDP2).

Sharded are the frozen weights inside the decoder's layers. A layer is gathered when it computes,
and let go at once. Everything else is on every rank: adapters, embedding, head, last norm, vision
tower. So gradients, optimizer, checkpoints and log-probabilities are those of a run whose ranks
hold the whole base, to the bit. Nodes hold a copy each, and no weights travel between them.

Forwards of a sharded base communicate, so every rank must make equally many. Each forward waits for
all ranks (`Ranks.meet`). A rank that has come to the end of its block (`Ranks.together`) meanwhile
runs one token of weight 0 whenever another has a forward to make. So forwards run inside such a
block, and one with gradient is followed by its backward.

A rank that fails or stops between two forwards is told of at the next one. One that fails in the
middle of a forward, as where memory runs out, leaves the others waiting in NCCL. That ends the run
after TIMEOUT, and the last checkpoint counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from engine.attention import Places, SharedPromptMask
from engine.config import UsageError
from engine.families import family_of, language_model
from engine.out_of_memory import is_out_of_memory, said_by
from engine.ranks import Ranks
from engine.runtime import DoesNotFit

# How long a rank waits for another's part of a layer. All come to a forward together, so this is no
# time that a rank computes alone.
TIMEOUT = timedelta(seconds=120)
# What the ranks meet for (`Ranks.meet`). A backward comes with its forward.
FORWARD, BACKWARD, GATHER = "forward", "backward", "gather"


class ShardedBase:
    """Keep the ranks in step where a base is sharded among them, and gather it for the sampler.

    gathered_now: whether this rank holds the whole base at the moment.
    """

    def __init__(self, net: PreTrainedModel, ranks: Ranks):
        """Take a base of `load_sharded`."""
        self.net, self.ranks = net, ranks
        self.family = family_of(net.config.model_type)
        self.decoder: Any = language_model(net)  # FSDP gives it methods that its class lacks
        self.gathered_now = self._idle_now = False
        # before FSDP's own hook, which gathers the first layer
        self.decoder.register_forward_pre_hook(self._before_forward, prepend=True)
        ranks.parts |= {
            FORWARD: partial(self._idle, False),
            BACKWARD: partial(self._idle, True),
            GATHER: self._gather_for_others,
        }

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole base within the block, where forwards do not communicate.

        All ranks enter it, those at the end of their block for a moment. Each leaves it alone.
        An adapter must not be saved inside: that lets the weights go.

        Raises DoesNotFit where the whole base does not fit on this rank's GPU.
        """
        if self.gathered_now:
            yield
            return
        self.ranks.meet(GATHER)
        try:
            self._gather()
            self.gathered_now = True
            yield
        finally:
            self.gathered_now = False
            self._let_go()

    def _gather(self) -> None:
        try:
            for layer in self.decoder.layers:
                layer.set_reshard_after_forward(False, recurse=False)
                layer.unshard()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"out of memory in gathering the base ({said_by(error)}): --shard_base shards it"
                " in training alone, and the sampler needs all of it on each GPU; take a smaller"
                " base, or larger GPUs"
            ) from error

    def _let_go(self) -> None:
        for layer in self.decoder.layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()

    def _gather_for_others(self) -> None:
        try:
            self._gather()
        finally:
            self._let_go()

    def _before_forward(self, decoder: nn.Module, inputs: Any) -> None:
        if self.gathered_now or self._idle_now:
            return
        if self.net.device.type == "cuda":
            # Else TIMEOUT would be counted from when a layer's gathering is queued, which may be
            # minutes before the GPU comes to it.
            torch.cuda.synchronize(self.net.device)
        self.ranks.meet(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def _idle(self, backward: bool) -> None:
        """Run one token without a prompt, of weight 0, beside another rank's forward."""
        device, width = self.net.device, self.decoder.config.hidden_size
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        sees = self.family.attention_masks(self.net, token == 0, token, token[0])
        places = Places(token[0], (1, 1))
        masks = {kind: SharedPromptMask(places, mask) for kind, mask in sees.items()}
        embedding = torch.zeros(1, width, dtype=self.decoder.dtype, device=device)
        positions = self.family.expand_positions(token)
        self._idle_now = True
        try:
            with torch.set_grad_enabled(backward):
                states = self.family.run_decoder(self.decoder, embedding, positions, masks)
                if backward:
                    (0 * states.sum()).backward()
        finally:
            self._idle_now = False


def load_sharded(
    whole: Callable[[torch.device], PreTrainedModel],
    empty: Callable[[torch.dtype], PreTrainedModel],
    device: torch.device,
    ranks: Ranks,
) -> PreTrainedModel:
    """Read a base on rank 0 alone, hand it to the others layer by layer, and shard each layer.

    whole: reads it, called on rank 0 with the CPU. empty: makes it without weights in a dtype.
    device: where it goes. A GPU never holds more than its part and one whole layer.

    Raises UsageError where nodes have different numbers of ranks.
    """
    sizes = ranks.gather(ranks.local_size)
    with ranks.together():
        if len(set(sizes)) > 1:
            raise UsageError("--shard_base: start as many ranks on each node (--nproc_per_node)")
        net = whole(torch.device("cpu")) if ranks.first else None
    dtype = ranks.from_first(str(net.dtype).removeprefix("torch.") if net else "")
    with ranks.together():
        if net is None:
            with torch.device("meta"):
                net = empty(getattr(torch, dtype))
            net.requires_grad_(False).eval()
    assert net is not None  # read or made
    decoder: Any = language_model(net)
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    _from_first(net, device, ranks)  # all that is outside of the layers
    decoder.layers = layers
    shard_base(net, node_mesh(ranks, device), partial(_from_first, device=device, ranks=ranks))
    return net


def node_mesh(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """Join the ranks of this node. Every node holds a copy of the base: no gradient joins them."""
    group, _ = dist.new_subgroups(ranks.local_size, timeout=TIMEOUT)
    return DeviceMesh.from_group(group, device.type)


def shard_base(
    net: nn.Module, mesh: DeviceMesh, fill: Callable[[nn.Module], object] = lambda layer: None
) -> None:
    """Shard the frozen weights inside the decoder's layers among the ranks of a mesh.

    fill: called with each layer before it is sharded.

    No parameter is cast: bf16 weights and fp32 adapters stay so. Adapters may be attached before or
    after, and are not FSDP's, which would leave each rank a shard of their gradients. Nor is what
    the engine reads outside of the decoder's forward.
    """
    decoder: Any = language_model(net)
    for layer in decoder.layers:
        fill(layer)
        adapters = {p for name, p in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    # The root, which is called from outside. It has no weights: it gathers layers ahead.
    everything = set(decoder.parameters())
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False, ignored_params=everything)


def _from_first(module: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Give rank 0's parameters and buffers to all, those that are in no state dict too."""
    if ranks.first:
        module.to(device)
    else:
        module.to_empty(device=device)
        if isinstance(module, PreTrainedModel):
            module.tie_weights()  # which to_empty has parted
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    own = [f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items()]
    told = [set(of_rank) for of_rank in ranks.gather(own)]
    odd = {one for of_rank in told for one in of_rank if any(one not in other for other in told)}
    if odd:  # a rank would wait for ever for what is not sent
        raise RuntimeError(f"the ranks make different models of the base, such as {min(odd)}")
    for tensor in tensors.values():
        dist.broadcast(tensor.data, 0)
