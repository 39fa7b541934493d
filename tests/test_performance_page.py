"""docs/performance.md shows what phi3v/training/memory.py gives, and no other bytes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from phi3v.config.schema import Checkpointing
from phi3v.training import memory
from phi3v.training.memory import CARDS, PUBLISHED, Pack
from tests.training.test_memory import deepspeed

PAGE = " ".join((Path(__file__).parents[1] / "docs/performance.md").read_text().split())
PACK = Pack(tokens=8192, views=52)
SMALL_BUCKETS = {"reduce_bucket_size": 100_000_000}
WAYS: tuple[Checkpointing, ...] = ("none", "selective", "full")


def giga(size: float) -> str:
    return f"{size / 1e9:.1f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def pack(decoder: Checkpointing, tower: Checkpointing, tokens: int = 8192, views: int = 52) -> Pack:
    return Pack(tokens=tokens, views=views, checkpointing=decoder, tower_checkpointing=tower)


def kept(pack: Pack) -> float:
    return memory.decoder_bytes(PUBLISHED, pack) + memory.tower_bytes(PUBLISHED, pack)


def state_rows() -> Iterator[str]:
    factors = {
        "zero1": "2 + 2 + 4 + 12/N",
        "zero2": "2 + 16/N",
        "zero3": "18/N",
        "zero3_hpz": "18/N + 2/8",
    }
    gpus = (1, 8, 32, 128)
    for name, factor in factors.items():
        shown = [giga(memory.state_bytes(PUBLISHED, deepspeed(name, n))[0]) for n in gpus]
        if name == "zero3_hpz":
            shown[0] = "-"  # a second partition of one rank
        yield row(f"`{name}.json`", factor, *shown)
    offload = [deepspeed("zero3_offload", n) for n in gpus]
    on_gpu = (memory.state_bytes(PUBLISHED, ds)[0] for ds in offload)
    yield row("`zero3_offload.json`, on the GPU", "2/N", *map(giga, on_gpu))
    hosts = (memory.host_memory(PUBLISHED, ds, PACK) for ds in offload)
    on_host = (giga(host.states + host.gradients) for host in hosts)
    yield row("`zero3_offload.json`, on the host, for each GPU", "(12 + 4 + 4)/N", *on_host)


def buffer_facts() -> Iterator[str]:
    stages = [deepspeed(name) for name in ("zero3", "zero2", "zero1")]
    buckets, joined = zip(*(memory.bucket_bytes(PUBLISHED, ds) for ds in stages), strict=True)
    yield row("gradients on their way: buckets of `reduce_bucket_size`", *map(giga, buckets))
    yield row("the same, joined or converted to be sent", *map(giga, joined))
    gathered = giga(memory.gathered_bytes(PUBLISHED, stages[0]))
    yield f"not on one GPU | {gathered} | - | - |"
    small = sum(memory.bucket_bytes(PUBLISHED, deepspeed("zero3", **SMALL_BUCKETS)))
    large = sum(memory.bucket_bytes(PUBLISHED, stages[0]))
    yield f"take {giga(small)} GB instead of {giga(large)}"


def activation_facts() -> Iterator[str]:
    layers = [memory.layer_bytes(PUBLISHED, how) for how in WAYS]
    towers = [memory.tower_layer_bytes(PUBLISHED, how) for how in WAYS]
    yield row("a decoder layer", *(f"{size / 1e3:.1f} KB" for size in layers))
    yield row("all 32, a token", *(f"{32 * size / 1e6:.2f} MB" for size in layers))
    yield row("a tower layer", *(f"{size / 1e3:.1f} KB" for size in towers))
    views = [f"{23 * 577 * size / 1e6:.0f} MB" for size in towers]
    yield row("all 23, a view of 577 tokens", *views)
    decoder, tower = memory.computed_again(PUBLISHED)
    yield f"| none | none | {decoder:.0%}".replace("%", " %") + f", tower {100 * tower:.0f} % |"
    sdpa = memory.layer_bytes(PUBLISHED, "none", sdpa=True) - layers[0]
    yield f"segment by segment, keeps {sdpa / 1e3:.1f} KB more"
    yield f"{32 * layers[2] / 1e6:.2f} MB a token less on the GPU"


def pack_facts() -> Iterator[str]:
    none, selective, full = (giga(kept(pack(how, how))) for how in WAYS)
    token = f"{32 * memory.layer_bytes(PUBLISHED, 'none') / 1e6:.2f} MB"
    view = f"{23 * 577 * memory.tower_layer_bytes(PUBLISHED, 'none') / 1e6:.0f} MB"
    yield f"8,192 x {token} + 52 x {view} = {none} GB without recomputation"
    yield f"{selective} GB selectively, and {full} GB in full"
    text = [giga(kept(pack(how, how, views=0))) for how in WAYS]
    yield f"A pack of text alone keeps {text[0]}, {text[1]} and {text[2]} GB"
    mixed = giga(kept(pack("none", "full")))
    yield f"`vision_checkpointing: full` with `checkpointing: none` keeps {mixed} GB"
    share = memory.tower_bytes(PUBLISHED, PACK) / kept(PACK)
    yield f"{100 * share:.0f} % of the memory"
    ds = deepspeed("zero3")
    lean, again = (memory.gpu_memory(PUBLISHED, ds, pack(how, how)) for how in ("none", "full"))
    yield f"{giga(lean.edges)} GB of views and of the projector come to it, and"
    yield f"{giga(lean.working)} GB for the layer whose gradients are being made"
    yield f"{giga(again.working)} GB where it is computed again"


def head_facts() -> Iterator[str]:
    def parts(vocabulary: int) -> tuple[str, str, str]:
        sizes = replace(PUBLISHED, vocabulary=vocabulary)
        chunk, head = memory.head_bytes(sizes, PACK)
        inputs = 2 * sizes.width * PACK.tokens
        return f"{chunk / 1e9:.2f}", f"{(head - inputs) / 1e9:.2f}", f"{inputs / 1e9:.2f}"

    chunk, gradient, inputs = parts(PUBLISHED.vocabulary)
    yield f"{memory.CHUNK:,} x (2 + 4) V bytes, {chunk} GB at V = 32,064"
    yield f"4 V D bytes, {gradient} GB"
    yield f"2 D a trained token, {inputs} GB for 8,192"
    chunk, gradient, _ = parts(128_256)
    yield f"at 128,256 tokens of vocabulary and the same width they are {chunk} and {gradient} GB"


def other_facts() -> Iterator[str]:
    cards = [giga(CARDS[name]) for name in ("80 GB", "40 GB", "141 GB")]
    yield f"a card of 80 GB has {cards[0]} of them, one of 40 GB {cards[1]}, an H200 {cards[2]}"
    one, several = map(giga, memory.CONTEXT.values())
    yield f"An estimate: {one} GB on one GPU, {several} GB on several"
    trained = PUBLISHED.trained()
    whole = PUBLISHED.parameters
    yield f"{whole / 1e9:.3f} B parameters, of which {trained / 1e9:.3f} B are trained"
    gradients = 4 * trained
    yield f"{giga(gradients)} GB down in the first round"
    yield f"{giga(2 * gradients)} GB, down and up, in each further one"
    weights = giga(2 * whole)
    yield f"3 x {weights} GB to and from each GPU"
    cache = 32 * 2 * PUBLISHED.keys * 2
    yield f"rows keep {cache / 1e6:.2f} MB a token each"
    yield f"16 rows of 4,096 tokens {giga(16 * 4096 * cache)} GB"


def host_facts() -> Iterator[str]:
    machines = [("zero3", 1), ("zero3", 8), ("zero3", 32), ("zero3_offload", 1)]
    used = [
        (min(ranks, 8), memory.host_memory(PUBLISHED, deepspeed(name, ranks), PACK))
        for name, ranks in machines
    ]
    offload = used[-1][1]
    yield row("an optimizer that is offloaded: states", *"---", giga(offload.states))
    yield row("its gradients, twice", *"---", giga(offload.gradients))
    staging = [giga(ranks * use.staging) for ranks, use in used]
    yield row("the copy from which a checkpoint is written", *staging)
    arenas = [giga(ranks * use.arenas) for ranks, use in used]
    yield row("packs that are read ahead, 52 views each", *arenas)
    yield f"12 bytes a parameter, {giga(12 * PUBLISHED.trained())} GB over all nodes"
    assert offload.total < 0.75 * 128e9
    yield f"needs {offload.total / 1e9:.0f} GB of pinned and other memory"


def choice_facts() -> Iterator[str]:
    offload = memory.host_memory(PUBLISHED, deepspeed("zero3_offload", 1), PACK).total / 1e9
    whole = "`none`, 8,192 tokens"
    machines = [
        (
            "1 x 80 GB, `zero3_offload.json`",
            deepspeed("zero3_offload", 1),
            whole + f"; the host needs {offload:.0f} GB",
        ),
        ("1 x 141 GB (H200), `zero3.json`", deepspeed("zero3", 1), whole),
        ("8 x 80 GB, `zero3.json`", deepspeed("zero3", 8), whole),
        (
            "8 x 40 GB, `zero3.json` with buckets of 100,000,000",
            deepspeed("zero3", 8, **SMALL_BUCKETS),
            "`full`, 8,192 tokens",
        ),
        ("32 x 80 GB, `zero3.json`", deepspeed("zero3", 32), whole),
        ("128 x 80 GB, `zero3_hpz.json`", deepspeed("zero3_hpz", 128), whole),
        ("128 x 80 GB, `zero2.json`", deepspeed("zero2", 128), "where accumulation is 1"),
        ("8 x 80 GB, `zero1.json`", deepspeed("zero1", 8), "tower `full`, and much accumulation"),
    ]
    ways: Sequence[tuple[Checkpointing, Checkpointing]]
    ways = (("none", "none"), ("none", "full"), ("full", "full"))
    for name, ds, choice in machines:
        totals = [memory.gpu_memory(PUBLISHED, ds, pack(*way)).total for way in ways]
        evaluation = memory.evaluation_memory(PUBLISHED, ds, 8, 2356)
        card = CARDS[re.findall(r"\d+ GB", name)[0]]
        chosen = totals["tower" in choice] if "`full`, 8" not in choice else totals[2]
        assert max(chosen, evaluation) < 0.85 * card, f"{name} does not take what it is told to"
        fixed = memory.fixed_bytes(PUBLISHED, ds)
        yield row(name, giga(fixed), *map(giga, totals), giga(evaluation), choice)


def small_and_large_facts() -> Iterator[str]:
    small = memory.gpu_memory(
        PUBLISHED, deepspeed("zero3", **SMALL_BUCKETS), pack("none", "none", 4096, 26)
    )
    yield f"tokens and 26 views without recomputation in {giga(small.total)} GB"
    lean, whole = (
        memory.gpu_memory(PUBLISHED, deepspeed("zero3"), pack("none", tower, 12288, 78)).total
        for tower in ("full", "none")
    )
    assert lean < 0.85 * CARDS["80 GB"] < whole
    found = f"in {giga(lean)} GB, and without recomputation in {giga(whole)} GB"
    yield f"`vision_checkpointing: full` {found}, which leaves too little"


FACTS = [
    fact
    for facts in (
        *(state_rows, buffer_facts, activation_facts, pack_facts, head_facts),
        *(other_facts, host_facts, choice_facts, small_and_large_facts),
    )
    for fact in facts()
]


def test_the_page_says_what_the_formulas_give() -> None:
    missing = [fact for fact in FACTS if fact not in PAGE]
    assert not missing, "\n".join(missing)


def test_the_keys_of_the_deepspeed_json_cost_what_their_page_says() -> None:
    page = (Path(__file__).parents[1] / "docs/deepspeed.md").read_text()
    bucket, joined = memory.bucket_bytes(PUBLISHED, deepspeed("zero3"))
    saved = bucket + joined
    saved -= sum(memory.bucket_bytes(PUBLISHED, deepspeed("zero3", **SMALL_BUCKETS)))
    assert f"in float32: {bucket / 1e9:.0f} GB, and {joined / 1e9:.0f} GB more" in page
    assert f"100,000,000 on cards of 40 GB saves {giga(saved)} GB" in page
    offload = deepspeed("zero3_offload", 1)
    states = memory.optimizer_bytes(offload), 4 + memory.gradient_bytes(offload)
    assert f"{states[0]} bytes per parameter of the rank's share" in page
    assert f"pinned memory, {states[1]} more before rounding" in page


def test_no_other_bytes_are_on_the_page() -> None:
    """But the names of cards, a host's, and what transformers' layers were counted to keep."""
    known = "|".join(
        re.escape(text)
        for text in (*FACTS, "transformers' own layers keep 158 and 41 KB", "a host of 128 GB")
    )
    machine = r"\b(\d+ x )?(40|80|141) GB\b"
    rest = re.sub(machine, "", re.sub(known, "", PAGE))
    assert not re.findall(r"[\d.]+ (?:GB|MB|KB)\b", rest)
    table_of_numbers = r"\| \d+\.\d+ \|"
    assert not re.findall(table_of_numbers, rest)
