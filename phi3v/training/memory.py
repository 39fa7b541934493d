"""What fills a GPU and its host: bytes, from a model's sizes, a DeepSpeed JSON and a pack.

    sizes = Sizes.of(config)                                 # or PUBLISHED
    use = gpu_memory(sizes, ds, Pack(tokens=8192, views=52), full_tower)
    use.total <= 0.85 * CARDS["80 GB"]
    host_memory(sizes, ds, pack).total * 8                   # of a node with 8 GPUs

docs/performance.md shows what these functions give, and tests hold it to them. Counted: parameters
and what layers keep (on a CPU, and on fake CUDA tensors). Read in DeepSpeed 0.19.8 and torch 2.13:
states, buckets, rounding. Estimated: `CONTEXT`, and `_working`. Nothing was measured on a GPU.
Left out: fragmentation of the allocator, a few per cent; on the host the processes themselves, the
page cache, and torch's pinned copies of less than a few megabytes.

Torch is not imported. Bytes are exact numbers, a gigabyte is 10^9 of them.

Letters: D width, F width inside the MLP, H heads, G heads of keys and of values, K head width,
V vocabulary, C tower width, M width inside the tower's MLP, P patches of a view, s merged patches
along a side of a view.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from phi3v.config import MODULES, DeepSpeedConfig, Module
from phi3v.config.schema import Checkpointing

CARDS = {"40 GB": 42.5e9, "80 GB": 85e9, "141 GB": 149e9}
"""Bytes that torch finds on a card that is sold by this name: A100; A100 and H100; H200."""

CONTEXT = {"one GPU": 1.5e9, "several": 2.5e9}
"""CUDA's context, workspaces of cuBLAS and of kernels, and with several GPUs NCCL: an estimate."""

CHUNK = 1024  # tokens whose logits are there at a time; phi3v/model/loss.py
READ_AHEAD = 4  # packs; phi3v/data/loader.py

DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
}
"""Elements, or ranks, where the JSON is silent. Source: DeepSpeed runtime/zero/config.py."""


JOINED_ELEMENTS = 500_000_000
"""Source: DeepSpeed runtime/engine.py `MEMORY_OPT_ALLREDUCE_SIZE`."""


class Tensor(NamedTuple):
    """A parameter: its module, whether it decays, its elements, whether it is ever trained."""

    module: Module
    decays: bool
    elements: int
    is_used: bool = True


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model's configuration its memory depends on."""

    width: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tower_width: int
    tower_mlp: int
    tower_heads: int
    tower_layers: int
    """In the folder."""
    tower_used: int
    """That are computed; those above are frozen."""
    image: int
    """Pixels along a side of a view."""
    patch: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Those of a Phi3VConfig."""
        tower = config.vision_config
        return cls(
            width=config.hidden_size,
            mlp=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            tower_width=tower.hidden_size,
            tower_mlp=tower.intermediate_size,
            tower_heads=tower.num_attention_heads,
            tower_layers=tower.num_hidden_layers,
            tower_used=config.tower_layers,
            image=tower.image_size,
            patch=tower.patch_size,
        )

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values: GK."""
        return self.width * self.key_heads // self.heads

    @property
    def patches(self) -> int:
        """P"""
        return (self.image // self.patch) ** 2

    @property
    def view_pixels(self) -> int:
        """Numbers of a view."""
        return 3 * self.image**2

    @property
    def view_tokens(self) -> int:
        """Image tokens of a view, separators included: at most s(s + 1) + 1."""
        side = self.image // self.patch // 2
        return side * (side + 1) + 1

    @property
    def layer(self) -> int:
        """Weights of the matrices of a decoder layer."""
        return sum(self._matrices())

    def _matrices(self) -> tuple[int, ...]:
        width, mlp = self.width, self.mlp
        return width * width, width * (width + 2 * self.keys), width * 2 * mlp, mlp * width

    def tensors(self) -> Iterator[Tensor]:
        """All parameters in the order of the model."""
        yield Tensor("embeddings", True, self.vocabulary * self.width)
        yield from (Tensor("projector", False, 4 * self.tower_width),) * 2  # separators
        yield from self._tower_tensors()
        for columns in (4 * self.tower_width, self.width):
            yield Tensor("projector", True, self.width * columns)
            yield Tensor("projector", False, self.width)
        for _ in range(self.layers):
            yield from (Tensor("language", True, elements) for elements in self._matrices())
            yield from (Tensor("language", False, self.width),) * 2
        yield Tensor("language", False, self.width)
        yield Tensor("head", True, self.vocabulary * self.width)

    def _tower_tensors(self) -> Iterator[Tensor]:
        width, mlp = self.tower_width, self.tower_mlp
        norm = (False, width), (False, width)
        attention = ((True, width * width), (False, width)) * 4
        perceptron = (True, mlp * width), (False, mlp), (True, width * mlp), (False, width)
        patches = (True, width * 3 * self.patch**2), (False, (self.patches + 1) * width)
        for decays, elements in ((False, width), *patches, *norm):
            yield Tensor("vision", decays, elements)
        for number in range(self.tower_layers):
            for decays, elements in (*attention, *norm, *perceptron, *norm):
                yield Tensor("vision", decays, elements, number < self.tower_used)
        for decays, elements in norm:
            yield Tensor("vision", decays, elements, False)

    def trained_tensors(self, frozen: Collection[Module] = ()) -> list[Tensor]:
        return [t for t in self.tensors() if t.is_used and t.module not in frozen]

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors())

    def trained(self, frozen: Collection[Module] = ()) -> int:
        """Parameters that have a gradient, if the modules of `model.freeze` have none."""
        return sum(tensor.elements for tensor in self.trained_tensors(frozen))


PUBLISHED = Sizes(
    width=3072,
    mlp=8192,
    layers=32,
    heads=32,
    key_heads=32,
    vocabulary=32064,
    tower_width=1024,
    tower_mlp=4096,
    tower_heads=16,
    tower_layers=24,
    tower_used=23,
    image=336,
    patch=14,
)
"""Of Phi-3-vision and Phi-3.5-vision."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A pack, and how it is computed.

    labels  trained tokens; None: all, which is the most that the last layer and the head keep
    sdpa    attention by torch's scaled_dot_product_attention, segment by segment
    offload what a layer keeps under `full` waits in the host's memory
    """

    tokens: int
    views: int
    labels: int | None = None
    checkpointing: Checkpointing = "none"
    tower_checkpointing: Checkpointing = "none"
    sdpa: bool = False
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Use:
    """Bytes by part."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class GpuUse(Use):
    """Bytes of one GPU in the backward pass, where they are most."""

    states: float
    """Weights, gradients, optimizer."""
    buckets: float
    """Gradients on their way."""
    gathered: float
    """Weights of layers that are gathered and about to be."""
    context: float
    layers: float
    """What decoder and tower keep of the pack."""
    edges: float
    """What embeddings, patches and projector keep of it."""
    head: float
    """The head's gradient, and the gradient of what goes into it."""
    working: float
    """The layer whose gradients are being made, or a chunk of logits, whichever is more."""


@dataclass(frozen=True, kw_only=True)
class HostUse(Use):
    """Bytes of the host for one rank."""

    states: float
    """Of an optimizer that is offloaded."""
    gradients: float
    """Of an optimizer that is offloaded, twice."""
    staging: float
    """The copy that a checkpoint is written from."""
    arenas: float
    """Packs that are read ahead."""
    activations: float
    """That wait there, `model.offload_activations`."""


# Model states and buffers, by DeepSpeed.


def element(ds: DeepSpeedConfig) -> int:
    """Bytes of a weight in the model, and of a number in its activations."""
    return 2 if ds.bf16 else 4


def gradient_bytes(ds: DeepSpeedConfig) -> int:
    """Bytes of a parameter's gradient as rounds are added up."""
    return 2 if ds.bf16 and ds.json["data_types"]["grad_accum_dtype"] == "bf16" else 4


def optimizer_bytes(ds: DeepSpeedConfig) -> int:
    """Bytes of a parameter in the optimizer: a float32 copy, two moments of Adam.

    In float32 stage 3 has the weight itself for the copy, where the optimizer is not offloaded.
    """
    is_shared = not ds.bf16 and ds.zero_stage == 3 and not ds.offloads_optimizer
    return 8 if is_shared else 12


def state_bytes(
    sizes: Sizes, ds: DeepSpeedConfig, frozen: Collection[Module] = ()
) -> tuple[float, float]:
    """Model states of a rank: on its GPU, and of an offloaded optimizer on its host.

    Stage 1 keeps a gradient of each parameter in bf16 beside the float32 one.
    Offloaded, gradients are on the host twice, which `host_memory` adds.

    Source: ZeRO (arXiv 1910.02054), section 3; ZeRO++ (2306.10209), section 3.2; DeepSpeed
    runtime/zero/stage3.py `_create_fp32_partitions`, `initialize_optimizer_states`,
    `_setup_for_real_optimizer`; runtime/bf16_optimizer.py. Offload is read for stage 3 alone.
    """
    ranks, stage = ds.world_size, ds.zero_stage
    trained = sizes.trained(frozen)
    weights = sizes.parameters * element(ds)
    gradients, optimizer = trained * gradient_bytes(ds), trained * optimizer_bytes(ds)
    on_gpu = weights / ranks if stage == 3 else weights
    second = min(zero_value(ds, "zero_hpz_partition_size"), ranks)
    if stage == 3 and second > 1:
        on_gpu += weights / second
    if ds.offloads_optimizer:
        return on_gpu, optimizer / ranks
    if keeps_both_gradients(ds):
        on_gpu += trained * element(ds)
    on_gpu += (gradients if stage == 1 else gradients / ranks) + optimizer / ranks
    return on_gpu, 0.0


def bucket_bytes(
    sizes: Sizes, ds: DeepSpeedConfig, frozen: Collection[Module] = ()
) -> tuple[float, float]:
    """Of gradients on their way: the buckets, and what a collective joins or converts them to.

    Stage 3 collects in one bucket of the type in which ranks add up, and `reduce_scatter_coalesced`
    joins it once more, ordered by rank. Stage 2 has two in the weights' type with `overlap_comm`,
    converted in whole. Stage 1 in bf16 with float32 gradients has none: `reduce_bucket_size` is not
    read, and after the backward pass whole groups are joined until they exceed 5e8 elements.

    Source: DeepSpeed runtime/zero/stage3.py `_setup_for_real_optimizer`, `__avg_scatter_grads`,
    runtime/comm/coalesced_collectives.py; stage_1_and_2.py `setup_buckets`; engine.py
    `allreduce_no_retain`.
    """
    elements = zero_value(ds, "reduce_bucket_size")
    sent = 2 if ds.bf16 and ds.json["communication_data_type"] == "bf16" else 4
    if ds.zero_stage == 3:
        return elements * sent, elements * sent
    if keeps_both_gradients(ds):
        return 0.0, 4 * max(_joined(sizes, frozen))
    number = 2 if ds.json["zero_optimization"].get("overlap_comm") else 1
    own = gradient_bytes(ds) if ds.zero_stage == 1 else element(ds)
    return number * elements * own, elements * sent if own != sent else 0


def keeps_both_gradients(ds: DeepSpeedConfig) -> bool:
    """Whether a parameter has a bf16 gradient beside the float32 one, in a BF16_Optimizer.

    Source: DeepSpeed runtime/engine.py `_do_optimizer_sanity_check`, runtime/bf16_optimizer.py,
    which between rounds sets the bf16 gradient to zero and does not free it.
    """
    is_mixed = ds.bf16 and gradient_bytes(ds) == 4
    return ds.zero_stage == 1 and is_mixed and not ds.offloads_optimizer


def _joined(sizes: Sizes, frozen: Collection[Module]) -> Iterator[int]:
    """Elements of each tensor to which stage 1 joins the groups' gradients; one alone is not."""
    number = elements = 0
    for group in _groups(sizes, frozen):
        number, elements = number + 1, elements + sum(group)
        if elements > JOINED_ELEMENTS:
            yield elements if number > 1 else 0
            number = elements = 0
    yield elements if number > 1 else 0


def gathered_bytes(sizes: Sizes, ds: DeepSpeedConfig) -> float:
    """Of weights that stage 3 has gathered, and of the buffer in which the next ones arrive.

    One rank has nothing to gather. What is prefetched counts as live from the moment it is asked
    for; it arrives in one flat buffer, from which each weight is copied.

    Source: DeepSpeed runtime/zero/partitioned_param_coordinator.py `fetch_sub_module`,
    partition_parameters.py `AllGatherCoalescedHandle.wait`.
    """
    if ds.zero_stage < 3 or ds.world_size == 1:
        return 0.0
    live, ahead = (
        min(zero_value(ds, key), sizes.parameters)
        for key in ("stage3_max_live_parameters", "stage3_prefetch_bucket_size")
    )
    return element(ds) * (live + ahead)


def zero_value(ds: DeepSpeedConfig, key: str) -> int:
    """A number of the JSON's `zero_optimization`, or DeepSpeed's own."""
    return int(ds.json["zero_optimization"].get(key, DEFAULTS[key]))


# Activations.


def layer_bytes(sizes: Sizes, how: Checkpointing, number: int = 2, sdpa: bool = False) -> int:
    """Bytes per token that a decoder layer keeps for the backward pass.

    number  bytes of a number: 2 in bf16

    none: the input of each norm and 4 bytes of its root mean square, the input of each matrix, q, k
    and v turned, attention's result and a logarithm per head; SDPA keeps a copy of the result.
    selective: the layer's input, and what products and attention gave, but the last product.

    Source: phi3v/model/fused.py and checkpointing.py, counted in tests/model/.
    """
    width, turned, gate_up = sizes.width, sizes.width + 2 * sizes.keys, 2 * sizes.mlp
    if how == "full":
        return number * width
    if how == "selective":
        return number * (3 * width + turned + gate_up) + 4 * sizes.heads
    copies = 6 if sdpa else 5
    return number * (copies * width + turned + gate_up) + 4 * sizes.heads + 8


def tower_layer_bytes(sizes: Sizes, how: Checkpointing, number: int = 2) -> int:
    """Bytes per patch (and class token) that a tower layer keeps; as `layer_bytes`.

    Its norms keep mean and deviation in float32, as on CUDA; in bf16 on a CPU 8 bytes less in all.
    """
    width, mlp = sizes.tower_width, sizes.tower_mlp
    if how == "full":
        return number * width
    if how == "selective":
        return number * (6 * width + mlp) + 4 * sizes.tower_heads
    return number * (8 * width + mlp) + 4 * sizes.tower_heads + 16


def computed_again(sizes: Sizes) -> tuple[float, float]:
    """The share of FLOPs of products that `full` adds, in a decoder layer and in a tower layer.

    All but the last product of the forward pass, which is a third of a step.
    """
    tower, mlp = 4 * sizes.tower_width**2, sizes.tower_width * sizes.tower_mlp
    last = sizes.width * sizes.mlp
    return (1 - last / sizes.layer) / 3, (tower + mlp) / (tower + 2 * mlp) / 3


def decoder_bytes(sizes: Sizes, pack: Pack, number: int = 2) -> int:
    """What all decoder layers keep of a pack; the last, after its attention, of trained tokens."""
    if pack.checkpointing == "full":
        kept = 0 if pack.offload else number * sizes.width
        return sizes.layers * kept * pack.tokens
    layer = layer_bytes(sizes, pack.checkpointing, number, pack.sdpa)
    untrained = 0 if pack.labels is None else pack.tokens - pack.labels
    if pack.checkpointing == "selective":
        after = number * (sizes.width + 2 * sizes.mlp)
    else:
        # the input of the projection is gathered anew, beside attention's whole result
        after = number * (2 * sizes.width + 2 * sizes.mlp) + 4
    return sizes.layers * layer * pack.tokens - after * untrained


def tower_bytes(sizes: Sizes, pack: Pack, number: int = 2) -> int:
    """What the tower's layers keep of a pack."""
    if pack.tower_checkpointing == "full" and pack.offload:
        return 0
    layer = tower_layer_bytes(sizes, pack.tower_checkpointing, number)
    return pack.views * (sizes.patches + 1) * sizes.tower_used * layer


def edge_bytes(sizes: Sizes, pack: Pack, number: int = 2) -> int:
    """What is kept of a pack outside the layers: views, embedded patches, the projector.

    Of an image token the projector keeps its 4C, and D before and after GELU.
    """
    view = sizes.view_pixels + (sizes.patches + 1) * sizes.tower_width
    image_token = 4 * sizes.tower_width + 2 * sizes.width
    tokens = min(pack.tokens, pack.views * sizes.view_tokens)
    return number * (pack.views * view + tokens * image_token)


def head_bytes(sizes: Sizes, pack: Pack, number: int = 2) -> tuple[int, int]:
    """Of the head and its loss: a chunk's logits with their shares, and what is kept of all.

    A chunk takes (number + 4) V a token. Kept are the matrix's gradient in float32 and that of what
    comes in: 4VD, and D a trained token. So both grow with the vocabulary, and not with the pack.

    Source: phi3v/model/loss.py.
    """
    labels = pack.tokens if pack.labels is None else pack.labels
    chunk = min(CHUNK, labels) * (number + 4) * sizes.vocabulary
    return chunk, 4 * sizes.vocabulary * sizes.width + number * sizes.width * labels


def _working(sizes: Sizes, pack: Pack, number: int) -> float:
    """Of the decoder layer whose gradients are being made: an estimate, seen to 10 %.

    The gradients of its activations, of its weights, and what it keeps when it is computed again.
    Seen on fake tensors with 8,192 tokens: 0.6 GB, and 1.4 where it is computed again in full.
    """
    again = layer_bytes(sizes, "none", number) - layer_bytes(sizes, pack.checkpointing, number)
    gradients = number * (3 * sizes.width + 2 * sizes.mlp)
    return pack.tokens * (max(again, 0) + gradients) + number * sizes.layer


def gpu_memory(
    sizes: Sizes, ds: DeepSpeedConfig, pack: Pack, frozen: Collection[Module] = ()
) -> GpuUse:
    """What training on packs of this size takes of each GPU."""
    number = element(ds)
    chunk, head = head_bytes(sizes, pack, number)
    layers = decoder_bytes(sizes, pack, number) + tower_bytes(sizes, pack, number)
    edges, working = edge_bytes(sizes, pack, number), max(chunk, _working(sizes, pack, number))
    bucket, joined = bucket_bytes(sizes, ds, frozen)
    if keeps_both_gradients(ds):  # joined when the pack's are gone
        joined = max(0.0, joined - layers - edges - head - working)
    return GpuUse(
        states=state_bytes(sizes, ds, frozen)[0],
        buckets=bucket + joined,
        gathered=gathered_bytes(sizes, ds),
        context=context_bytes(ds),
        layers=layers,
        edges=edges,
        head=head,
        working=working,
    )


def context_bytes(ds: DeepSpeedConfig) -> float:
    """What no tensor accounts for: an estimate."""
    return CONTEXT["one GPU" if ds.world_size == 1 else "several"]


def fixed_bytes(sizes: Sizes, ds: DeepSpeedConfig, frozen: Collection[Module] = ()) -> float:
    """What a GPU holds whatever the pack: states, buffers, context."""
    states, _ = state_bytes(sizes, ds, frozen)
    bucket, joined = bucket_bytes(sizes, ds, frozen)
    buckets = bucket if keeps_both_gradients(ds) else bucket + joined
    return states + buckets + gathered_bytes(sizes, ds) + context_bytes(ds)


def evaluation_memory(
    sizes: Sizes, ds: DeepSpeedConfig, rows: int, tokens: int, frozen: Collection[Module] = ()
) -> float:
    """What answering takes of each GPU, beside the engine: the whole model, and a cache.

    rows    answered at once by a rank, `eval.batch_rows`
    tokens  of the longest prompt and its answer
    The prompts' pass takes the inside of one layer on top.
    """
    number = element(ds)
    cache = sizes.layers * 2 * sizes.keys * number * rows * tokens
    inside = number * (4 * sizes.width + 2 * sizes.keys + 3 * sizes.mlp) * rows * tokens
    return fixed_bytes(sizes, ds, frozen) + sizes.parameters * number + cache + inside


# The host.


def pinned(size: float) -> int:
    """What a pinned tensor of this many bytes takes: the next power of two.

    Source: torch 2.13 ATen/core/CachingHostAllocator.h `allocate`, without
    `pinned_max_round_threshold_mb` in PYTORCH_ALLOC_CONF.
    """
    return 1 << max(int(size) - 1, 0).bit_length()


def optimizer_shares(
    sizes: Sizes, ds: DeepSpeedConfig, frozen: Collection[Module] = ()
) -> list[int]:
    """Elements of each flat tensor that the optimizer of a rank steps.

    One for each module and each of decay or not; stage 3 cuts one that is larger than
    `sub_group_size` after the parameter that reaches it.

    Source: DeepSpeed runtime/zero/stage3.py `_create_fp16_sub_groups`; training/optimizer.py.
    """
    limit, ranks = zero_value(ds, "sub_group_size"), ds.world_size
    shares = []
    for tensors in _groups(sizes, frozen):
        group = [-(-elements // ranks) for elements in tensors]
        if ds.zero_stage < 3 or sum(group) <= limit:
            shares.append(sum(group))
            continue
        share = 0
        for number, elements in enumerate(group, 1):
            share += elements
            if share >= limit or number == len(group):
                shares.append(share)
                share = 0
    return shares


def _groups(sizes: Sizes, frozen: Collection[Module]) -> list[list[int]]:
    """Elements of the parameters of each of the optimizer's groups, in their order.

    Source: training/optimizer.py `parameter_groups`, without `optim.vision_layer_decay`.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for tensor in sizes.trained_tensors(frozen):
        key = MODULES.index(tensor.module), not tensor.decays
        groups.setdefault(key, []).append(tensor.elements)
    return [groups[key] for key in sorted(groups)]


def staging_bytes(
    sizes: Sizes, ds: DeepSpeedConfig, frozen: Collection[Module] = (), is_first: bool = False
) -> int:
    """Pinned memory of a rank in which a checkpoint's copy is made, kept from one to the next.

    None where the optimizer's state is in the host's memory already: that is written as it lies.
    At stages 1 and 2 the first rank has the weights as well.

    Source: training/checkpoints/writer.py.
    """
    copied = 0
    if not ds.offloads_optimizer:
        shares = optimizer_shares(sizes, ds, frozen)
        copied += 3 * sum(pinned(4 * share) for share in shares)
    if ds.zero_stage < 3 and is_first:
        copied += sum(pinned(element(ds) * tensor.elements) for tensor in sizes.tensors())
    return copied


def arena_bytes(sizes: Sizes, ds: DeepSpeedConfig, pack: Pack) -> int:
    """Pinned memory of a rank in which packs are read ahead, in whole steps.

    Source: data/loader.py `Loader.steps`; pixels are bytes, an id and a label 8 each.
    """
    rounds = ds.accumulation
    steps = -(-READ_AHEAD // rounds) + 1
    return rounds * steps * pinned(pack.views * sizes.view_pixels + 16 * pack.tokens)


def host_memory(
    sizes: Sizes,
    ds: DeepSpeedConfig,
    pack: Pack,
    frozen: Collection[Module] = (),
    is_first: bool = False,
) -> HostUse:
    """What a rank takes of its host, on CUDA; a node's is that of its ranks together."""
    states, gradients = state_bytes(sizes, ds, frozen)[1], 0
    if ds.offloads_optimizer:
        shares = optimizer_shares(sizes, ds, frozen)
        rounded = (
            pinned
            if ds.json["zero_optimization"]["offload_optimizer"].get("pin_memory", False)
            else int
        )
        gradients = rounded(gradient_bytes(ds) * sum(shares))
        gradients += sum(rounded(4 * share) for share in shares)
    waiting = 0
    if pack.offload:
        number = element(ds)
        if pack.checkpointing == "full":
            waiting += sizes.layers * pinned(number * sizes.width * pack.tokens)
        if pack.tower_checkpointing == "full":
            view = number * sizes.tower_width * (sizes.patches + 1)
            waiting += sizes.tower_used * pinned(view * pack.views)
    return HostUse(
        states=states,
        gradients=gradients,
        staging=staging_bytes(sizes, ds, frozen, is_first),
        arenas=arena_bytes(sizes, ds, pack),
        activations=waiting,
    )
