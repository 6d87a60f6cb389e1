"""Sessa (Selective State Space Attention, arXiv 2604.18580) in PyTorch: the reference and the peer of train_sessa.c.

Numbers in [ ] are the paper's equations. Letters: B batch, T sequence length, D model width, H query heads, G key/value
heads, d = D/H head width, L layers, V vocabulary; σ(n) = 1/sqrt(n). Parameters carry the names of the checkpoints'
tensors, so that state_dict() and a file of the C program have the same keys.
"""
import json
import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


@dataclass
class Config:
    vocab_size: int = 65
    d_model: int = 128
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int = 0         # 0: as many as n_heads
    max_seq_len: int = 64
    gamma_max: float = 0.999
    mixer: str = "sessa"        # "attention": the same block without its feedback path; "mamba2": a state-space recurrence
    dropout: float = 0.0
    seed: int = 1337            # of the dropout masks
    mamba_head_dim: int = 0     # w, a divisor of E = 2D; 0: 64, or E if that is less
    mamba_state_dim: int = 64   # N
    no_rope: bool = False       # the author's use_forward_rope=False

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.mamba_head_dim = self.mamba_head_dim or min(64, 2 * self.d_model)
        if self.mixer not in ("sessa", "attention", "mamba2"):
            raise ValueError(f"mixer is '{self.mixer}', not sessa, attention or mamba2")
        if self.mixer == "mamba2" and 2 * self.d_model % self.mamba_head_dim:
            raise ValueError("mamba2's head width must divide twice the model's width")
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2 or self.n_heads % self.n_kv_heads:
            raise ValueError("heads must divide the width into even parts, and key/value heads the heads")


# ----------------------------------------------------------------------------
# dropout: the mask is a hash, so that every program that knows (seed, micro-step, place, index) draws the same one

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1


def splitmix(z):
    """The SplitMix64 mixer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014; constants
    by Vigna) of a Python integer."""
    z = (z + GOLDEN) & WORD
    z = ((z ^ (z >> 30)) * MIX1) & WORD
    z = ((z ^ (z >> 27)) * MIX2) & WORD
    return z ^ (z >> 31)


def signed(z):
    """The int64 with the bits of the 64-bit word z."""
    return z - (1 << 64) if z >> 63 else z


def shift(z, n):
    """z >> n with zeros from the left: int64's own shift repeats the sign bit."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def splitmix_tensor(z):
    """splitmix of an int64 tensor: sums and products wrap, as those of unsigned words do."""
    z = z + signed(GOLDEN)
    z = (z ^ shift(z, 30)) * signed(MIX1)
    z = (z ^ shift(z, 27)) * signed(MIX2)
    return z ^ shift(z, 31)


def dropout(x, p, seed, micro_step, place):
    """x_i / (1-p) where the upper half of hash(seed, micro_step, place, i) is ≥ ⌊p·2^32⌋, else 0. x (B,T,D), i its flat index."""
    key = splitmix(splitmix(splitmix(seed) ^ micro_step) ^ place)
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    keep = shift(splitmix_tensor(index ^ signed(key)), 32) >= int(p * 2**32)
    return x * (keep.to(x.dtype) * (1 / (1 - p)))


# ----------------------------------------------------------------------------
# layers

def rope_tables(positions, d):
    """cos and sin of t·10000^(-2i/d), (positions, 1, d/2), in float64: float32 angles are off by 3e-4 at t 8192."""
    rates = 10000 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angles = (torch.arange(positions, dtype=torch.float64)[:, None] * rates)[:, None, :]
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    """Turns the pairs (2i, 2i+1) of each head by the angle of its position. x (B,T,heads,d), cos and sin (T,1,d/2)"""
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == cos.dtype and x.element_size() >= 4 and not torch.compiler.is_compiling():
        # as complex numbers, which takes eager PyTorch one pass over the data
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def strict_past(T, like):
    """(T,T), to add to logits: 0 where j < t, else -inf. Row 0, which has no past, is all 0, so that its softmax is finite;
    nobody reads it."""
    mask = torch.full((T, T), float("-inf"), dtype=like.dtype, device=like.device).triu()
    mask[0] = 0
    return mask


def feedback(f, fb_q, fb_k, gamma, mask, panel=512):
    """s of s_t = f_t + γ_t Σ_{j<t} α_tj s_j, the system (I - diag(γ) α) s = f. f, fb_q, fb_k, s (B,T,D), gamma (B,T)
    By panels of rows, because nothing right of a panel's triangle need be computed; for T ≤ 512 it is one panel."""
    T, scale, s = f.shape[1], fb_q.shape[-1] ** -0.5, None
    for i0 in range(0, T, panel):
        i1 = min(i0 + panel, T)
        logits = torch.baddbmm(mask[i0:i1, :i1], fb_q[:, i0:i1], fb_k[:, :i1].mT, alpha=scale)
        minus_A = torch.softmax(logits, -1) * -gamma[:, i0:i1, None]                                 # [17], -diag(γ) α
        known = torch.baddbmm(f[:, i0:i1], minus_A[:, :, :i0], s, alpha=-1) if i0 else f[:, :i1]
        # Only the entries below the diagonal are read: the diagonal counts as 1, and nothing above it exists.
        solved = torch.linalg.solve_triangular(minus_A[:, :, i0:], known, upper=False, unitriangular=True)   # [19-22]
        s = torch.cat((s, solved), 1) if i0 else solved
    return s


class Mixer(nn.Module):
    """ā (B,T,D) → s (B,T,D): attention, and with the mixer `sessa` its feedback loop."""

    def __init__(self, c):
        super().__init__()
        D, d = c.d_model, c.d_model // c.n_heads
        self.heads, self.kv_heads, self.gamma_max = c.n_heads, c.n_kv_heads, c.gamma_max
        self.feedback, self.no_rope = c.mixer == "sessa", c.no_rope
        self.q_proj = nn.Linear(D, D)                   # nn.Linear's own initial values are the ones wanted:
        self.k_proj = nn.Linear(D, c.n_kv_heads * d)    # weight and bias uniform in ±1/sqrt(in)
        self.v_proj = nn.Linear(D, c.n_kv_heads * d)
        if c.n_heads > 1:
            self.out_proj = nn.Linear(D, D, bias=False)
        if self.feedback:
            self.proj_fb = nn.Linear(D, 2 * D)
            self.gamma_ctx = nn.Linear(D, 1, bias=False)
            self.gamma_bias = nn.Parameter(torch.ones(()))

    def gain(self, abar):
        """γ (B,T) of ā"""
        return self.gamma_max * torch.tanh(self.gamma_ctx(abar).squeeze(-1) + self.gamma_bias)       # [18]

    def forward(self, abar, cos, sin, mask, acts=None, cache=None):
        B, T, D = abar.shape
        q = self.q_proj(abar).view(B, T, self.heads, -1)                                             # [14]
        k = self.k_proj(abar).view(B, T, self.kv_heads, -1)
        if not self.no_rope:
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        v = self.v_proj(abar).view(B, T, self.kv_heads, -1)
        past = cache.length if cache else 0
        if acts is not None:
            acts.update(q=q.flatten(2), k=k.flatten(2), v=v.flatten(2))
        if cache:
            k, v = cache.put("k", k), cache.put("v", v)
        if self.kv_heads < self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=2) for x in (k, v))
        # The only row after a past sees all of it: no mask.
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=not past)
        o = o.transpose(1, 2).reshape(B, T, D)                                                       # [15, 16]
        f = self.out_proj(o) if self.heads > 1 else o
        if not self.feedback:
            if acts is not None:
                acts.update(f=f, s=f)
            return f
        fb_q, fb_k = self.proj_fb(abar).split(D, dim=-1)                                             # [14]
        gamma = self.gain(abar)
        if past:    # one row: its past is known, so there is nothing to solve
            c = F.scaled_dot_product_attention(fb_q, cache.get("fb_k"), cache.get("s"))
            s = f + gamma[..., None] * c
        else:
            s = feedback(f, fb_q, fb_k, gamma, mask)
        if cache:
            cache.put("fb_k", fb_k), cache.put("s", s)
        if acts is not None:
            acts.update(f=f, fb_q=fb_q, fb_k=fb_k, gamma=gamma, s=s)
        return s


class GatedNorm(nn.Module):
    """RMSNorm(y ⊙ SiLU(z)), all of the width at once"""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y, z):
        y = y * F.silu(z)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Mamba2(nn.Module):
    """ā (B,T,D) → s (B,T,D): the selective state-space recurrence of Mamba-2 (arXiv 2405.21060) in the place of attention and
    feedback, written as the recurrence it is, one step after the other. E = 2D, E/w heads of width w, one b and one c of
    width N that all heads share; parameters are named as in state-spaces/mamba:

        [z, x, b, c, δ] = ā W_in^T                      widths E, E, N, N, E/w
        [x, b, c]       = SiLU(conv([x, b, c]))         each column by itself, over the last four positions
        Δ_t             = softplus(δ_t + dt_bias)       one a head
        h_t             = exp(-exp(A_log) Δ_t) h_{t-1} + Δ_t x_t b_t^T          (w,N) a head
        y_t             = h_t c_t + D x_t
        s               = RMSNorm(y ⊙ SiLU(z)) W_out^T
    """
    TAPS = 4

    def __init__(self, c):
        super().__init__()
        self.E, self.N, self.width = 2 * c.d_model, c.mamba_state_dim, c.mamba_head_dim
        self.heads, channels = self.E // self.width, self.E + 2 * self.N
        self.in_proj = nn.Linear(c.d_model, self.E + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, self.TAPS, groups=channels)    # its initial values: uniform in ±1/sqrt(taps)
        step = torch.exp(torch.empty(self.heads).uniform_(*torch.tensor((0.001, 0.1)).log().tolist()))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))         # softplus of it is the step
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedNorm(self.E)
        self.out_proj = nn.Linear(self.E, c.d_model, bias=False)

    def forward(self, abar, cos, sin, mask, acts=None, cache=None):
        z, xbc, delta = self.in_proj(abar).split((self.E, self.E + 2 * self.N, self.heads), dim=-1)
        known = cache.rows["xbc"] if cache and cache.length else xbc.new_zeros(len(xbc), self.TAPS - 1, xbc.shape[-1])
        taps = torch.cat((known, xbc), dim=1)           # a sequence begins with zeros
        xbc = F.silu(self.conv1d(taps.mT).mT)
        x, b, c = xbc.split((self.E, self.N, self.N), dim=-1)
        x = x.unflatten(-1, (self.heads, self.width))
        dt = F.softplus(delta + self.dt_bias)
        keep = torch.exp(-torch.exp(self.A_log) * dt)[..., None, None]
        h = cache.rows["h"] if cache and cache.length else x.new_zeros(len(x), self.heads, self.width, self.N)
        y = []
        for t in range(x.shape[1]):
            h = keep[:, t] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None, :]
            y.append((h * c[:, t, None, None, :]).sum(-1))
        y = (torch.stack(y, dim=1) + self.D[:, None] * x).flatten(2)
        if cache:
            cache.rows.update(xbc=taps[:, -(self.TAPS - 1):], h=h)
        s = self.out_proj(self.norm(y, z))
        if acts is not None:
            acts.update(z=z, conv=xbc, dt=dt, y=y, s=s)
        return s


class Layer(nn.Module):
    """y = x + (s ⊙ g) W_out^T + b_out, x and y (B,T,D)"""

    def __init__(self, c):
        super().__init__()
        self.ln = nn.LayerNorm(c.d_model)
        self.W_in = nn.Linear(c.d_model, 2 * c.d_model)
        self.mixer = Mamba2(c) if c.mixer == "mamba2" else Mixer(c)
        self.W_out = nn.Linear(c.d_model, c.d_model)

    def forward(self, x, cos, sin, mask, drop, place, acts=None, cache=None):
        n = self.ln(x)                                                                               # [9]
        a, g = self.W_in(n).chunk(2, dim=-1)                                                         # [10]
        s = self.mixer(F.gelu(a), cos, sin, mask, acts, cache)                                       # [11, 12]
        y = x + drop(self.W_out(drop(s * g, place)), place + 1)                                      # [13]
        if acts is not None:
            acts.update(ln=n, a=a, g=g, residual=y)
        return y


class Cache:
    """What a layer remembers while it generates: k, v, k', s of every past position, each (B, positions, …). A mamba2 layer puts
    its state and its last taps into `rows` itself, whose size does not grow."""

    def __init__(self, capacity):
        self.capacity, self.length, self.rows = capacity, 0, {}

    def put(self, name, x):
        """Appends the rows x (B,n,…) and returns all that are there by now. `length` moves when the whole layer is done."""
        if name not in self.rows:
            self.rows[name] = x.new_empty((x.shape[0], self.capacity) + x.shape[2:])
        self.rows[name][:, self.length:self.length + x.shape[1]] = x
        return self.rows[name][:, :self.length + x.shape[1]]

    def get(self, name):
        return self.rows[name][:, :self.length]


class Sessa(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.ln_f = nn.LayerNorm(c.d_model)
        self.make_rope(c.max_seq_len)

    def make_rope(self, positions):
        """Float64 tables, rounded where they are used. (Turn a model to float64 by .double(), but not from float32 by .float()
        and back: that would round the tables.)"""
        for name, table in zip(("cos", "sin"), rope_tables(positions, self.config.d_model // self.config.n_heads)):
            self.register_buffer(name, table.to(self.wte.weight.device), persistent=False)

    def forward(self, idx, targets=None, micro_step=0, acts=None, caches=None):
        """Logits (B,T,V), and with targets (B,T) the mean loss of those ≥ 0 (None without). micro_step = step·accum + micro-batch
        chooses the dropout masks of training. `acts`, a dict, takes every activation of the reference dumps. With `caches`, one
        Cache a layer, idx continues what they hold: any number of tokens at first, one at a time afterwards."""
        c, (B, T) = self.config, idx.shape
        past = caches[0].length if caches else 0
        if past and T > 1:
            raise ValueError("a cache that holds a past takes one token at a time")
        if past + T > self.cos.shape[0]:
            self.make_rope(2 * (past + T))
        p = c.dropout if self.training else 0.0
        drop = (lambda x, place: dropout(x, p, c.seed, micro_step, place)) if p else (lambda x, place: x)
        x = drop(self.wte(idx), 0)
        cos, sin = (table[past:past + T].to(x.dtype) for table in (self.cos, self.sin))
        mask = strict_past(T, x) if c.mixer == "sessa" and not past else None
        if acts is not None:
            acts["encoded"] = x
        for l, layer in enumerate(self.layers):
            here = None if acts is None else {}
            x = layer(x, cos, sin, mask, drop, 1 + 2 * l, here, caches[l] if caches else None)
            if acts is not None:
                acts.update({f"layers.{l}.{name}": value for name, value in here.items()})
        for cache in caches or ():
            cache.length += T
        x = self.ln_f(x)
        logits = F.linear(x, self.wte.weight)                                      # the head is the embedding, tied
        if acts is not None:
            acts.update(ln_f=x, logits=logits)
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=-1, reduction="sum")
        return logits, total / (targets >= 0).sum().clamp(min=1)


# ----------------------------------------------------------------------------
# training, generation, files

def configure_adamw(model, lr, betas, eps, weight_decay):
    """AdamW with decay on every parameter of two or more dimensions, in one fused kernel."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def generate(model, idx, n, temperature=1.0, top_k=0, window=None, generator=None):
    """idx (B,T) continued by n sampled tokens, (B,T+n): the prompt in one pass, then O(t·D) a token and layer. `window` (default
    max_seq_len, 0: no bound) positions are remembered; when they are full, the last half is read afresh."""
    model.eval()
    window = model.config.max_seq_len if window is None else window
    capacity = window or idx.shape[1] + n
    caches = None
    for made in range(n):
        if caches is None or caches[0].length == capacity:
            keep = capacity if made == 0 else max(capacity // 2, 1)
            caches = [Cache(capacity) for _ in model.layers]
            logits, _ = model(idx[:, -keep:], caches=caches)
        else:
            logits, _ = model(idx[:, -1:], caches=caches)
        logits = logits[:, -1].float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k:
                smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, float("-inf"))
            token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        idx = torch.cat((idx, token), dim=1)
    return idx


def read_metadata(path):
    """The strings under __metadata__ of a safetensors file."""
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__", {})


METADATA = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "gamma_max", "mixer")
MAMBA_METADATA = ("mamba_head_dim", "mamba_state_dim")


def config_of(metadata):
    """The model's configuration in a file's metadata."""
    kinds = {"gamma_max": float, "mixer": str}
    return Config(**{name: kinds.get(name, int)(metadata[name]) for name in METADATA + MAMBA_METADATA
                     if name in metadata or name in METADATA}, no_rope=metadata.get("no_rope") == "1")


def metadata_of(config):
    """What config_of reads: the model's configuration for a file's metadata."""
    names = METADATA + (MAMBA_METADATA if config.mixer == "mamba2" else ())
    return {name: getattr(config, name) for name in names} | ({"no_rope": 1} if config.no_rope else {})


def load_checkpoint(path):
    """(model, config, metadata) of a safetensors checkpoint. model.tokenizer: the bytes of a character vocabulary, or None.
    The optimiser's moments, if there, are left alone; any other surplus or missing tensor is an error."""
    metadata, tensors = read_metadata(path), load_file(path)
    config = config_of(metadata)
    model = Sessa(config)
    tokenizer = tensors.pop("tokenizer.bytes", None)
    model.tokenizer = None if tokenizer is None else bytes(tokenizer.tolist())
    weights = {k: v for k, v in tensors.items() if not k.startswith(("exp_avg.", "exp_avg_sq."))}
    model.load_state_dict(weights, strict=True)
    return model, config, metadata
