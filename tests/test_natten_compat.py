"""The drop-in for NATTEN: its names in all versions, and Hugging Face's DiNAT, which stands on them."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natrpb
from natrpb import reference
from natrpb.compat import natten
from natrpb.patterns import neighborhood_pattern

from .support import close

SPATIAL = {1: (13,), 2: (9, 11), 3: (6, 7, 8)}
EACH_NDIM = pytest.mark.parametrize("ndim", [1, 2, 3])


@pytest.fixture
def imported():
    """Installs a version and returns what `import natten` then finds."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "natten"}

    def install(*version: str):
        natten.install(*version)
        import natten as package

        return package

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        del sys.modules[name]
    sys.modules.update(before)


def heads_first(ndim: int, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, 4, *SPATIAL[ndim], 6, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def table(ndim: int, kernel_size: int = 3) -> torch.Tensor:
    return torch.randn(4, *[2 * kernel_size - 1] * ndim, dtype=torch.float64, requires_grad=True)


def plain_scores(ndim: int, query, key, rpb, kernel_size, dilation):
    return reference.local_qk(query, key, rpb, neighborhood_pattern(ndim, kernel_size, 1, dilation, False))


def plain_sums(ndim: int, attn, value, kernel_size, dilation):
    return reference.local_av(attn, value, neighborhood_pattern(ndim, kernel_size, 1, dilation, False))


# ---- unfused ----


@EACH_NDIM
@pytest.mark.parametrize("dilation", [1, 2])
def test_unfused_ops_of_every_version(ndim, dilation):
    query, key, value = heads_first(ndim)
    rpb = table(ndim)
    scores = plain_scores(ndim, query, key, rpb, 3, dilation)
    sizes = (3, 3, dilation, dilation) if ndim == 3 else (3, dilation)
    close(getattr(natten, f"natten{ndim}dqkrpb")(query, key, rpb, *sizes), scores)
    close(getattr(natten, f"na{ndim}d_qk_with_bias")(query, key, rpb, *sizes), scores)
    close(getattr(natten, f"na{ndim}d_qk")(query, key, 3, dilation, rpb=rpb), scores)
    close(getattr(natten, f"natten{ndim}dqk")(query, key, *sizes), plain_scores(ndim, query, key, None, 3, dilation))
    weights = scores.softmax(-1)
    sums = plain_sums(ndim, weights, value, 3, dilation)
    close(getattr(natten, f"natten{ndim}dav")(weights, value, *sizes), sums)
    close(getattr(natten, f"na{ndim}d_av")(weights, value, 3, dilation), sums)
    if ndim < 3:  # as up to 0.14.4
        close(getattr(natten, f"natten{ndim}dqkrpb")(query, key, rpb, dilation), scores)
        close(getattr(natten, f"natten{ndim}dav")(weights, value, dilation), sums)


def test_the_first_of_three_axes_has_sizes_of_its_own():
    query, key, value = heads_first(3)
    rpb = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    scores = plain_scores(3, query, key, rpb, (2, 3, 3), (3, 2, 2))
    close(natten.natten3dqkrpb(query, key, rpb, 2, 3, 3, 2), scores)
    close(natten.natten3dav(scores, value, 2, 3, 3, 2), plain_sums(3, scores, value, (2, 3, 3), (3, 2, 2)))


def test_volumes_of_0_15(imported):
    query, key, value = heads_first(3)
    extra = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    package = imported("0.15.1").functional
    ours = package.na3d_qk(query, key, 2, 3, 3, 2, additional_keys=extra)
    close(ours, natten.na3d_qk(query, key, (2, 3, 3), (3, 2, 2), extra))
    sums = natten.na3d_av(ours, value, (2, 3, 3), (3, 2, 2), extra)
    close(package.na3d_av(ours, value, 2, 3, 3, 2, additional_values=extra), sums)


@EACH_NDIM
def test_additional_keys_follow_the_neighborhood(ndim):
    """Unfused and fused are one attention over the neighborhood's keys and the additional ones."""
    query, key, value = heads_first(ndim)
    extra_key, extra_value = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    rpb = table(ndim)
    scores = getattr(natten, f"na{ndim}d_qk")(query, key, 3, additional_keys=extra_key, rpb=rpb)
    slots = 3**ndim
    assert scores.shape[-1] == slots + 5
    close(scores[..., :slots], plain_scores(ndim, query, key, rpb, 3, 1))
    close(scores[..., slots:].flatten(2, -2), query.flatten(2, -2) @ extra_key.mT)
    out = getattr(natten, f"na{ndim}d_av")(scores.softmax(-1), value, 3, additional_values=extra_value)
    last = [x.movedim(1, -2) for x in (query, key, value)]
    fused = getattr(natten, f"na{ndim}d")(
        *last, 3, rpb=rpb, scale=1.0, additional_keys=extra_key.movedim(1, 2), additional_values=extra_value.movedim(1, 2)
    )
    close(out.movedim(1, -2), fused)


def test_bad_input_of_unfused_ops():
    query, key, value = heads_first(2)
    extra = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    weights = torch.randn(2, 4, 9, 11, 9 + 5, dtype=torch.float64)
    for wrong in (extra[:1], extra[:, 1:], extra[..., 1:]):
        with pytest.raises(ValueError, match=r"additional_keys must have shape \[2, 4, T, 6\], got"):
            natten.na2d_qk(query, key, 3, additional_keys=wrong)
        with pytest.raises(ValueError, match=r"additional_values must have shape \[2, 4, T, 6\], got"):
            natten.na2d_av(weights, value, 3, additional_values=wrong)
    with pytest.raises(ValueError, match=r"additional_keys must have shape \[B, heads, T, D\]"):
        natten.na2d_qk(query, key, 3, additional_keys=extra[0])
    with pytest.raises(ValueError, match="attn must have shape"):
        natten.na2d_av(weights[..., 1:], value, 3, additional_values=extra)
    with pytest.raises(TypeError, match="rpb must be a tensor where the kernel size is not given, got NoneType"):
        natten.natten2dqkrpb(query, key, None, 3)


def test_gradients_of_the_oldest_names():
    query, key, value = heads_first(2)
    rpb = table(2)

    def attend(scores, sums):
        return sums(scores(query, key, rpb, 3, 2).softmax(-1), value, 3, 2).sin().sum()

    ours = attend(natten.natten2dqkrpb, natten.natten2dav)
    exact = attend(lambda *args: plain_scores(2, *args), lambda *args: plain_sums(2, *args))
    for one, other in zip(*(torch.autograd.grad(result, (query, key, value, rpb)) for result in (ours, exact))):
        close(one, other)


# ---- fused ----


@EACH_NDIM
def test_order_of_arguments_follows_the_version(ndim, imported):
    query, key, value = (x.movedim(1, -2) for x in heads_first(ndim))
    rpb, attend = table(ndim), getattr(natrpb, f"na{ndim}d")
    older = getattr(imported("0.17.5").functional, f"na{ndim}d")
    close(older(query, key, value, 3, 2, False, rpb, 0.5), attend(query, key, value, 3, dilation=2, rpb=rpb, scale=0.5))
    newer = getattr(imported("0.21.0"), f"na{ndim}d")
    expected = attend(query, key, value, 3, stride=2, dilation=1, is_causal=True, scale=0.5)
    close(newer(query, key, value, 3, 2, 1, True, 0.5, backend="cutlass-fna", q_tile_shape=(8,)), expected)
    close(newer(query, key, value, 3, 2, rpb=rpb), attend(query, key, value, 3, stride=2, rpb=rpb))  # an extension
    generic = sys.modules["natten.functional"].neighborhood_attention_generic
    close(generic(query, key, value, 3, 2, 1, True, 0.5), expected)
    with pytest.raises(TypeError, match=rf"na{ndim}d_of_0_20\(\) got an unexpected keyword argument 'tile'"):
        newer(query, key, value, 3, tile=3)


def test_generic_attention_refuses_other_ranks():
    with pytest.raises(ValueError, match=r"query must have shape \[B, 1 to 3 spatial axes, heads, D\], got \[3, 4, 5\]"):
        natten.neighborhood_attention_generic(*torch.randn(3, 3, 4, 5), 3)
    with pytest.raises(ValueError, match=r"query must have shape .* got list"):
        natten.neighborhood_attention_generic([], [], [], 3)


def test_merging_attentions():
    query, key, value = torch.randn(3, 2, 12, 4, 6, dtype=torch.float64)
    parts = [
        natrpb.na1d(query, x, y, 12, scale=1.0, return_lse=True) for x, y in ((key, value), (key * 2, value + 1), (value, key))
    ]
    out, lse = natten.merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
    keys, values = torch.cat([key, key * 2, value], 1), torch.cat([value, value + 1, key], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys)
    close(lse, scores.logsumexp(-1).movedim(1, -1))
    close(out, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values))
    for wrong in (([out], [lse]), ([out, out], [lse])):
        with pytest.raises(ValueError, match="outputs and lse_tensors must be lists of one length"):
            natten.merge_attentions(*wrong)
    with pytest.raises(ValueError, match=r"outputs\[1\] must have shape \[2, 12, 4, 6\], got \[2, 12, 4, 5\]"):
        natten.merge_attentions([out, out[..., 1:]], [lse, lse])
    with pytest.raises(ValueError, match=r"lse_tensors\[1\] must have shape \[2, 12, 4\], got \[2, 11, 4\]"):
        natten.merge_attentions([out, out], [lse, lse[:, 1:]])


# ---- modules ----


@EACH_NDIM
def test_modules_of_every_version(ndim, imported):
    name = f"NeighborhoodAttention{ndim}D"
    ours = getattr(natrpb, name)
    x = torch.randn(2, *SPATIAL[ndim], 16)

    def same(version: str, args, options: dict):
        made, expected = getattr(imported(version), name)(*args), ours(16, **options)
        assert isinstance(made, ours) and made.state_dict().keys() == expected.state_dict().keys()
        expected.load_state_dict(made.state_dict())
        close(made(x), expected(x))
        small = torch.randn(2, *[2] * ndim, 16)
        if options.get("pad_small_inputs"):
            close(made(small), expected(small))
        else:
            with pytest.raises(ValueError, match="kernel_size"):
                made(small)

    biased = dict(num_heads=4, kernel_size=3, rel_pos_bias=True, pad_small_inputs=True)
    if ndim < 3:
        same("0.14.2", (16, 3, 4, False, 0.5), biased | dict(qkv_bias=False, qk_scale=0.5))
        same("0.14.2", (16, 3, 4, True, None, 0.0, 0.0, 2), biased | dict(dilation=2))
    steps = (None, 2, None) if ndim == 3 else (2,)  # kernel_size_d, dilation, dilation_d
    same("0.14.6", (16, 4, 3, *steps, True, False), biased | dict(dilation=2, qkv_bias=False))
    same("0.15.1", (16, 4, 3, *steps, False), biased | dict(dilation=2, rel_pos_bias=False))
    if ndim == 3:
        sizes = dict(kernel_size=(2, 3, 3), dilation=(1, 2, 2))
        same("0.15.1", (16, 4, 3, 2, 2, 1), biased | sizes)
    same("0.17.5", (16, 4, 3, 2, False, True), dict(num_heads=4, kernel_size=3, dilation=2, rel_pos_bias=True))
    same("0.17.5", (16, 4, 3, 2, True), dict(num_heads=4, kernel_size=3, dilation=2, is_causal=True))
    same("0.21.6", (16, 4, 3, 2, 2, True), dict(num_heads=4, kernel_size=3, stride=2, dilation=2, is_causal=True))


EACH_EPOCH = pytest.mark.parametrize("version", ["0.14.2", "0.14.6", "0.15.1", "0.17.5", "0.21.0"])


def made(package, version: str, ndim: int) -> torch.nn.Module:
    """A module of a version's class, and of a state that no constructor gives."""
    sizes = (3, 2) if version == "0.14.2" and ndim < 3 else (2, 3)  # kernel_size came before num_heads
    module = getattr(package, f"NeighborhoodAttention{ndim}D")(16, *sizes).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.requires_grad_(False)


def same_module(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert type(one) is type(other) and repr(one) == repr(other) and one.training is other.training
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, parameter in one.named_parameters():
        assert parameter.equal(other.get_parameter(name)) and parameter.requires_grad is other.get_parameter(name).requires_grad
    x = torch.randn(1, *SPATIAL[len(one.kernel_size)], 16)
    assert one(x).equal(other(x))


@EACH_NDIM
@EACH_EPOCH
def test_modules_are_pickled(ndim, version, imported, tmp_path):
    module = made(imported(version), version, ndim)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        same_module(pickle.loads(pickle.dumps(module, protocol)), module)
    same_module(copy.deepcopy(module), module)
    torch.save(module, tmp_path / "module.pt")
    same_module(torch.load(tmp_path / "module.pt", weights_only=False), module)
    assert type(module).__name__ == f"NeighborhoodAttention{ndim}D"


@EACH_EPOCH
def test_ops_are_pickled(version, imported):
    package = imported(version)
    for op in (package.na2d, package.na2d_qk, package.na3d_qk, package.na3d_av, package.natten2dqkrpb):
        assert pickle.loads(pickle.dumps(op)) is op


UNPICKLE = """
import pickle, sys, torch

with open(sys.argv[1], "rb") as file:
    saved = pickle.load(file)
assert "natten" not in sys.modules
import natrpb
for version, (module, x, out) in saved.items():
    natrpb.compat.natten.install(version)
    import natten
    assert type(module) is natten.NeighborhoodAttention2D, (version, type(module))
    assert not module.training and module(x).equal(out), version
    del natten
print("equal", *saved)
"""


def test_modules_are_unpickled_where_nothing_is_installed(imported, tmp_path):
    saved = {}
    for version in ("0.14.2", "0.14.6", "0.15.1", "0.17.5", "0.21.0"):
        module, x = made(imported(version), version, 2), torch.randn(2, *SPATIAL[2], 16)
        saved[version] = module, x, module(x)
    (tmp_path / "saved.pkl").write_bytes(pickle.dumps(saved))
    command = [sys.executable, "-c", UNPICKLE, str(tmp_path / "saved.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.split() == ["equal", *saved], done.stderr


# ---- versions ----


def test_installed_modules(imported):
    package = imported()
    assert package.__version__ == natten.DEFAULT_VERSION
    functions = importlib.import_module("natten.functional")
    assert package.functional is functions
    assert functions.na2d is natten.na2d and functions.natten2dav is natten.natten2dav
    assert package.NeighborhoodAttention2D is natten.NeighborhoodAttention2D
    assert package.has_bfloat(0) and package.has_fna() and not package.has_gemm()
    assert package.has_cuda() == ("cuda" in natrpb.info()["devices"])
    public = {name for name in vars(package) if not name.startswith("_")}
    assert not public & {"install", "torch", "Tensor", "functools", "Callable"}
    assert hasattr(package, "context") and not hasattr(imported("0.15.1"), "context")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.context")  # of the version installed before
    assert imported("0.21.0").__version__ == "0.21.0"


@pytest.mark.parametrize(
    ("version", "like"),
    [
        ("0.21", "0.21.0"),
        ("0.17", "0.17.0"),
        ("0.14", "0.14.0"),
        ("0.17.5+torch260cu126", "0.17.5"),
        ("0.21+a.B-1_c", "0.21.0"),
    ],
)
def test_versions_of_two_numbers_and_of_wheels(version, like, imported):
    names = {name: value for name, value in vars(imported(like).functional).items() if not name.startswith("__")}
    package = imported(version)
    assert package.__version__ == version
    assert names == {name: value for name, value in vars(package.functional).items() if not name.startswith("__")}


NO_VERSIONS = ["0.13.0", "0.22.0", "0.22", 0.17, "1.0.0", "newest", "", None, "0", "17", "0.17.", "0.17.5.1", "0.17.5rc1"]
NO_VERSIONS += ["v0.17.5", " 0.17.5", "0.17.5\n", "0.-17", "0.17.5+", "0.17.5+cu126+a", "0.17.5+cu_", "0.22.0+cu126", "0.٢١"]


@pytest.mark.parametrize("version", NO_VERSIONS)
def test_refuses_what_is_no_version(version, imported):
    before = sys.modules.get("natten")
    with pytest.raises(ValueError, match=r"version must be one of NATTEN's from 0\.14\.0 to 0\.21"):
        imported(version)
    assert sys.modules.get("natten") is before


# ---- switches ----

HAS = {f"has_{what}" for what in ("cuda", "half", "bfloat", "gemm", "tf32_gemm", "fp32_gemm", "fp64_gemm")}
ENABLE = {f"{verb}_{what}" for verb in ("enable", "disable") for what in ("tf32", "gemm_na", "tiled_na")}
UNFUSED = [(f"use_{what}", f"is_{what}_enabled") for what in ("tf32_in_gemm_na", "gemm_na", "tiled_na")]
FUSED = [("use_fna", "is_fna_enabled"), ("use_fused_na", "is_fused_na_enabled")]
LASTING = [
    ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
    ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled"),
]
MEMORY = {"set_memory_usage_preference", "get_memory_usage_preference", "MemoryUsagePreference"}
MEMORY |= {f"is_memory_usage_{preference}" for preference in ("default", "strict", "unrestricted")}
AUTOTUNER = {"use_autotuner", "disable_autotuner", "is_autotuner_enabled"}
AUTOTUNER |= {f"is_autotuner_{how}_for_{which}" for how in ("enabled", "thorough") for which in ("forward", "backward")}
FLEX = {"use_flex_attention", "should_use_flex_attention", "force_flex_attention", "should_force_flex_attention"}
COMPILED = [(f"allow_{what}", f"is_{what}_allowed") for what in ("flex_compile", "flex_compile_backprop")]
IN_0_15 = HAS | ENABLE
IN_0_17 = IN_0_15 | {name for pair in UNFUSED + FUSED + LASTING for name in pair} | MEMORY | AUTOTUNER
IN_0_17 |= {"has_fna", "has_fused_na"}
IN_0_20 = MEMORY | {name for pair in LASTING + COMPILED for name in pair}
IN_0_20 |= {"HAS_LIBNATTEN", "disable_flex_compile", "disable_flex_compile_backprop"}


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        (("0.14.0", "0.14.6"), set()),
        (("0.15.0", "0.15.1"), IN_0_15),
        (("0.17.0", "0.17.4"), IN_0_17),
        (("0.17.5",), IN_0_17 | FLEX),
        (("0.20.0", "0.21.6"), IN_0_20),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_switches_are_those_of_the_version(versions, names, imported):
    for version in versions:
        package = imported(version)
        for module in (package, package.functional):
            assert vars(module).keys() & (IN_0_17 | FLEX | IN_0_20) == names


@pytest.mark.parametrize(("use", "ask"), UNFUSED + FUSED + LASTING + COMPILED)
def test_switches_remember(use, ask):
    use, ask = getattr(natten, use), getattr(natten, ask)
    before = ask()
    for mode in (not before, before):
        use(mode)
        assert ask() is mode
    use(mode=not before)
    use()
    assert ask() is True
    use(before)


def test_switches_at_first():
    """What holds in this library; asked where no other test has turned any."""
    script = """
from natrpb.compat import natten
for version in ("0.15.1", "0.17.5", "0.21.6"):
    names = natten._surface(version)[0]
    print(*(name for name, ask in names.items() if name.startswith(("is_", "are_", "should_")) and ask()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    kept = {"are_deterministic_algorithms_enabled", "is_memory_usage_default"}
    expected = [set(), kept | {"is_fused_na_enabled", "is_fna_enabled"}, kept]
    assert [set(line.split()) for line in done.stdout.splitlines()] == expected, done.stderr


def test_switches_that_turn_others():
    """Each ends as it began."""
    fused = natten.is_fused_na_enabled, natten.is_kv_parallelism_in_fused_na_enabled
    fused += natten.should_use_flex_attention, natten.should_force_flex_attention
    for use, modes in (
        (natten.use_flex_attention, (True, True, True, False)),
        (natten.force_flex_attention, (True, True, True, True)),
        (lambda: natten.use_fna(False, True, True, True), (False,) * 4),
        (lambda: natten.use_fused_na(kv_parallel=False), (True, False, False, False)),
    ):
        use()
        assert tuple(ask() for ask in fused) == modes

    tuned = natten.is_autotuner_enabled_for_forward, natten.is_autotuner_enabled_for_backward
    tuned += natten.is_autotuner_thorough_for_forward, natten.is_autotuner_thorough_for_backward
    for use, modes in (
        (lambda: natten.use_autotuner(backward_pass=True, steps_backward=3), (False, True, False, False)),
        (lambda: natten.use_autotuner(True, None, True), (True, True, True, False)),
        (lambda: natten.use_autotuner(False, False, thorough_mode_backward=True), (False, False, True, True)),
        (natten.disable_autotuner, (False,) * 4),
    ):
        use()
        assert tuple(ask() for ask in tuned) == modes and natten.is_autotuner_enabled() is (modes[0] or modes[1])

    for what, ask in (("tf32", "tf32_in_gemm_na"), ("gemm_na", "gemm_na"), ("tiled_na", "tiled_na")):
        for verb, mode in (("enable", True), ("disable", False)):
            assert getattr(natten, f"{verb}_{what}")() is getattr(natten, f"is_{ask}_enabled")() is mode

    compiled = natten.is_flex_compile_allowed, natten.is_flex_compile_backprop_allowed
    for use, modes in (
        (lambda: natten.allow_flex_compile(backprop=True), (True, True)),
        (natten.disable_flex_compile_backprop, (True, False)),
        (natten.disable_flex_compile, (False, False)),
    ):
        use()
        assert tuple(ask() for ask in compiled) == modes


def test_memory_usage_preference(imported):
    package = imported("0.21.6")
    preferences = ("strict", "unrestricted", "default")
    for preference in preferences:
        package.set_memory_usage_preference(preference)
        assert package.get_memory_usage_preference() is package.context.MemoryUsagePreference[preference.capitalize()]
        assert [getattr(package, f"is_memory_usage_{one}")() for one in preferences] == [
            one == preference for one in preferences
        ]
    for wrong in ("Strict", "is_set", None):
        with pytest.raises(ValueError, match="pref must be 'default', 'strict' or 'unrestricted', got"):
            package.set_memory_usage_preference(wrong)
    assert package.is_memory_usage_default()


def test_signatures_name_the_arguments():
    assert list(inspect.signature(natten.na2d).parameters)[3:7] == ["kernel_size", "dilation", "is_causal", "rpb"]
    assert natten.na2d.__name__ == "na2d" and "natrpb.na2d" in natten.na2d.__doc__


# ---- Hugging Face ----

SCRIPT = """
from tests.torchvision_operators import define_torchvision_operators
import natrpb, torch
define_torchvision_operators()
natrpb.compat.natten.install()
import transformers

torch.manual_seed(0)
sizes = dict(embed_dim=16, depths=[2, 1, 2, 1], num_heads=[1, 2, 4, 4], kernel_size=3, mlp_ratio=2.0)
dilations = [[1, 3], [2], [1, 2], [1]]
config = transformers.DinatConfig(
    **sizes, dilations=dilations, num_labels=5, layer_scale_init_value=0.5, drop_path_rate=0.0
)
model = transformers.DinatForImageClassification(config).double().eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
assert natrpb.compat.patch(model) is model

ours = natrpb.create_model("dinat_mini", **sizes, dilations=dilations, num_classes=5, layer_scale=0.5).double().eval()
ours.load_state_dict(natrpb.convert.to_official(model.state_dict()))
images = torch.randn(2, 3, 40, 56, dtype=torch.float64)  # the last map is 2 x 2, smaller than the kernel
result = model(images, output_attentions=True)
torch.testing.assert_close(result.logits, ours(images), atol=1e-9, rtol=1e-9)
torch.testing.assert_close(model(images).logits, result.logits, atol=1e-9, rtol=1e-9)
assert result.attentions[0].shape[-1] == 9, [x.shape for x in result.attentions]

model(images).logits.square().sum().backward()
ours(images).square().sum().backward()
expected = natrpb.convert.to_huggingface({name: x.grad for name, x in ours.named_parameters()})
for name, x in model.named_parameters():
    torch.testing.assert_close(x.grad, expected[name], atol=1e-7, rtol=1e-7)
print("equal")
"""


def test_dinat_of_hugging_face_runs_and_trains():
    pytest.importorskip("transformers", exc_type=ImportError)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.strip().endswith("equal"), done.stderr
