"""Tests of sessa.py, dump.py and the committed dumps: dev/pytorch/test_model.py, or pytest dev/pytorch/test_model.py. No GPU."""
import math
import os
import sys
import tempfile
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import sessa
from dump import COMMITTED, HYPER, lively_model, random_batch, write_dump
from runner import Skip, run_tests
from sessa import (Config, Sessa, config_of, configure_adamw, dropout, feedback, generate, load_checkpoint, read_metadata, shift,
                   signed, splitmix, splitmix_tensor, strict_past, Cache)

CONFIGS = [Config(23, 16, 2, 4, 2, 40), Config(17, 12, 2, 1, 0, 40, 0.9), Config(19, 16, 2, 2, 1, 40, mixer="attention"),
           Config(11, 24, 3, 3, 3, 40, 0.5), Config(13, 12, 2, 1, 0, 40, mixer="mamba2", mamba_head_dim=8, mamba_state_dim=5)]
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")


def model_of(config, seed=0):
    return lively_model(config, seed).double().eval()


def close(x, y, bound, what):
    error = (x - y).norm().item() / max(y.norm().item(), 1e-30)
    assert error <= bound, f"{what}: relative error {error:.1e}, bound {bound:.1e}"


# ----------------------------------------------------------------------------
# the model against loops that spell the equations out, one number at a time

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def linear(x, layer):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias)]


def softmax(logits):
    largest = max(logits)
    e = [math.exp(l - largest) for l in logits]
    return [x / sum(e) for x in e]


def layernorm(x, layer):
    mean = sum(x) / len(x)
    rstd = 1 / math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) * rstd * w + b for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist())]


def turned(x, t, d):
    out = list(x)
    for i in range(0, len(x), 2):
        angle = t * 10000 ** (-(i % d) / d)
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
    return out


def silu(x):
    return x / (1 + math.exp(-x))


def naive_mamba2(m, abar):
    """s of a mamba2 mixer by loops. abar: T rows"""
    E, N, w, K, T = m.E, m.N, m.width, m.TAPS, len(abar)
    projected = [[dot(row, x) for row in m.in_proj.weight.tolist()] for x in abar]
    taps, bias = m.conv1d.weight[:, 0].tolist(), m.conv1d.bias.tolist()
    state, rows = [[[0.0] * N for _ in range(w)] for _ in range(m.heads)], []
    for t in range(T):
        u = [silu(bias[i] + sum(taps[i][K - 1 - j] * projected[t - j][E + i] for j in range(min(K, t + 1)))) for i in range(E + 2 * N)]
        x, b, c, y = u[:E], u[E:E + N], u[E + N:], [0.0] * E
        for head in range(m.heads):
            step = math.log1p(math.exp(projected[t][2 * E + 2 * N + head] + m.dt_bias[head].item()))
            decay = math.exp(-math.exp(m.A_log[head].item()) * step)
            for i in range(w):
                h = state[head][i]
                for n in range(N):
                    h[n] = decay * h[n] + step * x[head * w + i] * b[n]
                y[head * w + i] = dot(h, c) + m.D[head].item() * x[head * w + i]
        gated = [yi * silu(zi) for yi, zi in zip(y, projected[t][:E])]
        size = math.sqrt(dot(gated, gated) / E + 1e-5)
        normed = [v / size * g for v, g in zip(gated, m.norm.weight.tolist())]
        rows.append([dot(row, normed) for row in m.out_proj.weight.tolist()])
    return rows


def naive_logits(model, ids):
    """Logits of one sequence by loops."""
    c = model.config
    D, d, group, T = c.d_model, c.d_model // c.n_heads, c.n_heads // c.n_kv_heads, len(ids)
    x = [model.wte.weight[i].tolist() for i in ids]
    for layer in model.layers:
        m = layer.mixer
        ag = [linear(layernorm(row, layer.ln), layer.W_in) for row in x]
        abar = [[0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in row[:D]] for row in ag]
        if c.mixer == "mamba2":
            s = naive_mamba2(m, abar)
            x = [[xi + bi for xi, bi in zip(x[t], linear([si * gi for si, gi in zip(s[t], ag[t][D:])], layer.W_out))] for t in range(T)]
            continue
        q = [turned(linear(row, m.q_proj), t, d) for t, row in enumerate(abar)]
        k = [turned(linear(row, m.k_proj), t, d) for t, row in enumerate(abar)]
        v = [linear(row, m.v_proj) for row in abar]
        s = []
        for t in range(T):
            o = []
            for h in range(c.n_heads):
                g = h // group * d
                w = softmax([dot(q[t][h * d:h * d + d], k[j][g:g + d]) / math.sqrt(d) for j in range(t + 1)])
                o += [sum(w[j] * v[j][g + i] for j in range(t + 1)) for i in range(d)]
            f = linear(o, m.out_proj) if c.n_heads > 1 else o
            if c.mixer == "sessa":
                fb = [linear(row, m.proj_fb) for row in abar[:t + 1]]
                gamma = c.gamma_max * math.tanh(dot(abar[t], m.gamma_ctx.weight[0].tolist()) + m.gamma_bias.item())
                alpha = softmax([dot(fb[t][:D], fb[j][D:]) / math.sqrt(D) for j in range(t)]) if t else []
                f = [f[i] + gamma * sum(alpha[j] * s[j][i] for j in range(t)) for i in range(D)]
            s.append(f)
        x = [[xi + bi for xi, bi in zip(x[t], linear([si * gi for si, gi in zip(s[t], ag[t][D:])], layer.W_out))] for t in range(T)]
    x = [layernorm(row, model.ln_f) for row in x]
    return torch.tensor([[dot(row, e) for e in model.wte.weight.tolist()] for row in x], dtype=torch.float64)


def test_model_equals_plain_loops():
    for c in CONFIGS:
        model = model_of(c)
        ids, _ = random_batch(c, 2, 9, 0)
        with torch.no_grad():
            logits, _ = model(ids)
        for b in range(2):
            close(logits[b], naive_logits(model, ids[b].tolist()), 1e-12, c)


def test_gradients_by_central_differences():
    """Along a random direction through all parameters at once."""
    for c in CONFIGS:
        model = model_of(c)
        batch = random_batch(c, 2, 15, 0.2)
        model(*batch)[1].backward()
        torch.manual_seed(1)
        direction = [torch.randn_like(p) for p in model.parameters()]
        slope = sum((p.grad * v).sum() for p, v in zip(model.parameters(), direction))
        losses = []
        with torch.no_grad():
            for move in (1e-6, -2e-6):
                for p, v in zip(model.parameters(), direction):
                    p += move * v
                losses.append(model(*batch)[1])
        close((losses[0] - losses[1]) / 2e-6, slope, 1e-7, c)


def test_feedback_gradcheck():
    torch.manual_seed(2)
    f, q, k = (torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gamma = (torch.rand(2, 7, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    for panel in (512, 3, 1):
        assert torch.autograd.gradcheck(lambda *x: feedback(*x, strict_past(7, f), panel), (f, q, k, gamma))
        whole, parts = (feedback(f, q, k, gamma, strict_past(7, f), P) for P in (512, panel))
        close(parts, whole, 1e-13, panel)


# ----------------------------------------------------------------------------
# what the theory says of the feedback loop

def test_impulse_response():
    """Constant γ and uniform α: s_{τ+ℓ} = γ Γ(τ+1)/Γ(τ+1+γ) Γ(τ+ℓ+γ)/Γ(τ+ℓ+1), a power law in the lag."""
    T = 200
    zeros = torch.zeros(1, T, 2, dtype=torch.float64)
    for gamma in (0.3, 0.9, 0.999, -0.6):
        for tau in (0, 1, 17):
            f = zeros.clone()
            f[0, tau] = 1
            s = feedback(f, zeros, zeros, torch.full((1, T), gamma, dtype=torch.float64), strict_past(T, f))[0, :, 0]
            at = torch.arange(tau + 1, T, dtype=torch.float64)      # τ + ℓ
            start = torch.tensor(tau + 1.0, dtype=torch.float64)
            want = gamma * torch.exp(torch.lgamma(start) - torch.lgamma(at + 1) + torch.lgamma(at + gamma))
            want = want * math.exp(-math.lgamma(tau + 1 + gamma)) * math.copysign(1, math.gamma(tau + 1 + gamma))
            assert s[tau] == 1 and (s[:tau] == 0).all()
            close(s[tau + 1:], want, 1e-11, (gamma, tau))


def test_bound_of_s():
    torch.manual_seed(3)
    f, q, k = (torch.randn(4, 150, 8, dtype=torch.float64) * size for size in (1, 5, 5))
    for largest in (0.5, 0.99):
        gamma = largest * torch.tanh(3 * torch.randn(4, 150, dtype=torch.float64))
        s = feedback(f, q, k, gamma, strict_past(150, f))
        assert s.abs().max() <= f.abs().max() / (1 - gamma.abs().max())


# ----------------------------------------------------------------------------
# Mamba-2 against transformers' module

def test_mamba2_equals_transformers():
    """The mixer with the same weights in transformers' Mamba2Mixer, in float64, output and gradients, whatever its chunk."""
    try:
        import transformers
        from transformers.models.mamba2 import modeling_mamba2 as theirs
    except ImportError:
        raise Skip("transformers is not installed")
    print(f"      against transformers {transformers.__version__}")
    to, D, w, N = torch.Tensor.to, 12, 8, 10

    def never_narrower(x, *args, **kwargs):     # theirs turns to float32 in places; a float64 tensor stays one here
        return x if x.dtype == torch.float64 and args[:1] == (torch.float32,) else to(x, *args, **kwargs)

    transformers.utils.logging.set_verbosity_error()    # it warns that its fast kernels are missing
    for chunk in (1, 16, 64):
        ours = model_of(Config(9, D, 1, 1, mixer="mamba2", mamba_head_dim=w, mamba_state_dim=N)).layers[0].mixer
        config = transformers.Mamba2Config(hidden_size=D, expand=2, head_dim=w, num_heads=2 * D // w, state_size=N, n_groups=1, conv_kernel=4,
                                           chunk_size=chunk, layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True, hidden_act="silu")
        mixer = theirs.Mamba2Mixer(config, layer_idx=0).double()
        mixer.load_state_dict(ours.state_dict(), strict=True)
        reference = getattr(mixer, "torch_forward", mixer)      # its plain PyTorch path, which some versions name
        torch.manual_seed(4)
        x = torch.randn(2, 37, D, dtype=torch.float64, requires_grad=True)
        target = torch.randn(2, 37, D, dtype=torch.float64)
        results = []
        with mock.patch.multiple(torch.Tensor, float=lambda x: x, to=never_narrower):
            for forward in (lambda: ours(x, None, None, None), lambda: reference(x)):
                s = forward()
                results.append([s.detach(), *torch.autograd.grad((s * target).sum(), [x])])
            pairs = dict(mixer.named_parameters())
            for forward, own in ((lambda: ours(x, None, None, None), dict(ours.named_parameters())), (lambda: reference(x), pairs)):
                results.append(torch.autograd.grad((forward() * target).sum(), [own[name] for name in sorted(own)]))
        for what, a, b in zip(("s", "dx"), *results[:2]):
            close(a, b, 1e-12, (what, chunk))
        for what, a, b in zip(sorted(pairs), *results[2:]):
            close(a, b, 1e-11, (what, chunk))


# ----------------------------------------------------------------------------
# generation, dropout, loss, optimiser, files

def test_cache_equals_full_pass():
    for c in CONFIGS:
        model = model_of(c)
        ids, _ = random_batch(c, 2, 30, 0)
        with torch.no_grad():
            full, _ = model(ids)
            for prompt in (1, 11):
                caches = [Cache(30) for _ in model.layers]
                steps = [model(ids[:, :prompt], caches=caches)[0]]
                steps += [model(ids[:, t:t + 1], caches=caches)[0] for t in range(prompt, 30)]
                close(torch.cat(steps, 1), full, 1e-12, (c, prompt))
            out = generate(model, ids[:, :5], 20, temperature=0)
            for t in range(5, 25):      # greedy: each token is the likeliest of a full pass over those before it
                assert (model(out[:, :t])[0][:, -1].argmax(-1) == out[:, t]).all()
            assert generate(model, ids, 25, window=8).shape == (2, 55) and generate(model, ids, 25, window=0, top_k=3).shape == (2, 55)


def test_window():
    """When the window is full, its last half is read afresh."""
    c = CONFIGS[0]
    model, window = model_of(c), 8
    ids, _ = random_batch(c, 1, 3, 0)
    out = generate(model, ids, 20, temperature=0, window=window)
    start = 0
    with torch.no_grad():
        for t in range(3, 23):
            if t - start > window:
                start = t - window // 2
            assert model(out[:, start:t])[0][0, -1].argmax() == out[0, t]


def test_hash():
    # the generator's published first numbers from the seed 1234567
    golden, numbers = 0x9E3779B97F4A7C15, (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    for i, number in enumerate(numbers):
        assert splitmix((1234567 + i * golden) % 2**64) == number
    words = [0, 1, 2**32, 2**63, 2**64 - 1] + [splitmix(i) for i in range(100)]
    hashed = splitmix_tensor(torch.tensor([signed(w) for w in words]))
    assert [h % 2**64 for h in hashed.tolist()] == [splitmix(w) for w in words]
    assert shift(torch.tensor([-1]), 32).item() == 2**32 - 1


def test_dropout():
    x = torch.ones(3, 50, 20)
    for p in (0.1, 0.5, 0.75):
        mask = dropout(x, p, 1337, 7, 3)
        assert torch.equal(mask, dropout(x, p, 1337, 7, 3))
        assert all(not torch.equal(mask, dropout(x, p, *other)) for other in ((1338, 7, 3), (1337, 8, 3), (1337, 7, 4)))
        key = splitmix(splitmix(splitmix(1337) ^ 7) ^ 3)
        want = [(splitmix(key ^ i) >> 32) >= int(p * 2**32) for i in range(x.numel())]
        close(mask.flatten(), torch.tensor(want) / (1 - p), 1e-7, p)
        assert abs(sum(want) / len(want) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / len(want))
    c = Config(23, 16, 2, 4, 2, 40, dropout=0.3)
    model = model_of(c)
    batch = random_batch(c, 2, 12, 0)
    off = model(*batch)[1]
    model.train()
    assert torch.equal(model(*batch, micro_step=5)[1], model(*batch, micro_step=5)[1])
    assert model(*batch, micro_step=5)[1] != model(*batch, micro_step=6)[1] and model(*batch, micro_step=5)[1] != off
    c.dropout = 0.0
    assert torch.equal(model(*batch)[1], off)


def test_dropout_places():
    """0: the embedding, 1 + 2l: s ⊙ g of layer l, 2 + 2l: its branch."""
    model, acts, seen = model_of(Config(23, 16, 3, 4, 2, 40, dropout=0.3, seed=99)).train(), {}, {}
    original = sessa.dropout

    def recorded(x, p, seed, micro_step, place):
        assert (p, seed, micro_step) == (0.3, 99, 12) and place not in seen
        seen[place] = (x, original(x, p, seed, micro_step, place))
        return seen[place][1]

    sessa.dropout = recorded
    try:
        model(*random_batch(model.config, 2, 12, 0), micro_step=12, acts=acts)
    finally:
        sessa.dropout = original
    assert sorted(seen) == list(range(7)) and torch.equal(seen[0][1], acts["encoded"])
    x = acts["encoded"]
    for l, layer in enumerate(model.layers):
        here = {name: acts[f"layers.{l}.{name}"] for name in ("s", "g", "residual")}
        assert torch.equal(seen[1 + 2 * l][0], here["s"] * here["g"])
        assert torch.equal(seen[2 + 2 * l][0], layer.W_out(seen[1 + 2 * l][1])) and torch.equal(here["residual"], x + seen[2 + 2 * l][1])
        x = here["residual"]


def test_loss():
    c = CONFIGS[0]
    model = model_of(c)
    ids, targets = random_batch(c, 2, 12, 0.4)
    logits, loss = model(ids, targets)
    rows = torch.log_softmax(logits, -1)
    want = [-rows[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] >= 0]
    close(loss, sum(want) / len(want), 1e-14, "loss")
    _, loss = model(ids, torch.full_like(targets, -1))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_weight_decay_groups():
    model = Sessa(CONFIGS[0])
    decayed, others = configure_adamw(model, 1e-3, (0.9, 0.99), 1e-8, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in (decayed, others))
    assert {"wte.weight", "layers.1.mixer.gamma_ctx.weight", "layers.0.mixer.proj_fb.weight"} <= decayed
    assert {"ln_f.weight", "layers.0.ln.bias", "layers.1.mixer.gamma_bias", "layers.0.W_in.bias"} <= others
    assert len(decayed) + len(others) == len(names)


def test_initial_values():
    model = Sessa(Config(500, 64, 2, 4))
    for name, p in model.named_parameters():
        if name == "wte.weight":
            assert abs(p.std().item() / 0.02 - 1) < 0.05
        elif ".ln." in name or name.startswith("ln_f"):
            assert (p == name.endswith("weight")).all()
        elif name.endswith("gamma_bias"):
            assert p == 1 and p.shape == ()
        else:
            assert p.abs().max() <= 1 / 8 and p.abs().max() > 0.1 and abs(p.mean()) < 0.05
    for name, p in Sessa(Config(50, 256, 1, 4, mixer="mamba2", mamba_head_dim=2)).layers[0].mixer.named_parameters():
        size = p.abs().max().item()
        if name == "dt_bias":       # log-uniform: as many steps below 0.01 as above
            step = torch.nn.functional.softplus(p)
            assert 0.001 * 0.999 < step.min() < 0.0012 and 0.09 < step.max() < 0.1001 and abs((step < 0.01).float().mean() - 0.5) < 0.12
        elif name == "A_log":
            assert 1 <= p.exp().min() < 1.5 and 15.5 < p.exp().max() <= 16.0001
        elif name in ("D", "norm.weight"):
            assert (p == 1).all()
        elif name.startswith("conv1d"):
            assert 0.49 < size <= 0.5
        else:
            bound = p.shape[1] ** -0.5
            assert 0.99 * bound < size <= bound


def test_dump_and_checkpoint_round_trip():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "d.safetensors")
        for c in CONFIGS:
            model = lively_model(c)
            losses = write_dump(path, model, *random_batch(c, 2, 12, 0.2))
            tensors = load_file(path)
            assert len(losses) == len(tensors["losses"]) == 5 and losses[4] < losses[0]
            assert config_of(read_metadata(path)) == c
            # what a checkpoint of the C program looks like: the weights, a vocabulary and the optimiser's moments
            weights = {name: tensors[name] for name in model.state_dict()}
            save_file({**weights, "tokenizer.bytes": torch.arange(c.vocab_size, dtype=torch.uint8) + 65,
                       **{f"exp_avg.{name}": w.clone() for name, w in weights.items()}}, path, read_metadata(path))
            again, config, _ = load_checkpoint(path)
            assert config == c and again.tokenizer == bytes(range(65, 65 + c.vocab_size))
            assert all(torch.equal(p, weights[name]) for name, p in again.state_dict().items())


def test_committed_dumps():
    """The committed dumps, computed anew from their own weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "again.safetensors")
        for name in COMMITTED:
            file = os.path.join(DATA, name + ".safetensors")
            committed, metadata = load_file(file), read_metadata(file)
            model = Sessa(config_of(metadata))
            model.load_state_dict({name: committed[name] for name in model.state_dict()})
            hyper = {key: float(metadata[key]) for key in HYPER}
            write_dump(path, model, committed["inputs"], committed["targets"], hyper, len(committed["losses"]))
            again = load_file(path)
            assert again.keys() == committed.keys() and read_metadata(path) == metadata
            for key, want in committed.items():
                assert want.isfinite().all()
                # A bias of keys moves nothing, and its gradient is rounding: that of k', without RoPE of k too.
                keys_bias = key.endswith("proj_fb.bias") or ("no_rope" in metadata and key.endswith("k_proj.bias"))
                floor = 1e-9 if keys_bias else 0
                assert (again[key].double() - want.double()).norm() <= 2e-7 * want.double().norm() + floor, (name, key)


if __name__ == "__main__":
    torch.set_num_threads(1)    # small tensors
    run_tests(globals())
