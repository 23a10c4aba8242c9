"""The least that a step computes: its products, one after the other, and nothing between them.

What the compiler expects of this program is the bound that the step is measured against on the same devices: the same
weights and cache in the same places, and the communication that their sharding needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.caches import KVCache, LayerCache
from llama_jax.caches.none import NoCache
from llama_jax.costs.estimate import Workload
from llama_jax.model import Llama
from llama_jax.model.blocks import Block
from llama_jax.model.layers import REMAT, listed
from llama_jax.ops.weights import einsum
from llama_jax.plan import program
from llama_jax.plan.program import Lowered
from llama_jax.train import build
from llama_jax.train.losses import TOKENS
from llama_jax.train.step import attached, handles
from llama_jax.typing import PyTree


def lower_floor(job: Workload, mesh: jax.sharding.Mesh) -> Lowered:
    """The floor program of a job; of training that of one microbatch."""
    with jax.set_mesh(mesh):
        if job.mode == "train":
            model = build.make_model(program.recipe_of(job), job.config)
        else:
            model = program.serving_model(job)
        rows, T = job.batch // job.microbatches, 1 if job.mode == "decode" else job.seq_len
        shape = (rows, T, job.config.embed_dim)
        where = model.rules.sharding(("batch", "seq", "act_embed"), shape)
        x_BTD = jax.ShapeDtypeStruct(shape, model.dtype, sharding=where)
        if job.mode == "decode":
            args = (model, program.abstract_cache(model, job), x_BTD)
            function = decode_floor
        else:
            args, function = (model, x_BTD), training_floor if job.mode == "train" else prefill_floor
        return program.lowered(jax.jit(function).lower(*args), args, model)


def decode_floor(model: Llama, cache: KVCache, x_B1D: jax.Array) -> jax.Array:
    """The products of one step with each other's results: no norms, RoPE, mask, softmax, cache writes or sampling.

    Args:
      model: blocks in a list.
      cache: of the model.
      x_B1D: the residual stream, one token a row.

    Returns:
      [B, 1, V] in x's dtype, split as logits are. The numbers mean nothing.
    """
    assert isinstance(cache, tuple), "a list of blocks takes a list of caches"
    for block, layer in zip(listed(model.blocks), cache, strict=True):
        x_B1D = _block(block, layer, x_B1D)
    return _head(model, x_B1D)


def _head(model: Llama, x_BTD: jax.Array, head: PyTree = None) -> jax.Array:
    tied = model.config.tie_embeddings
    head = (model.embed if tied else model.lm_head) if head is None else head
    spec = model.rules.spec(("batch", "seq", "vocab"), (*x_BTD.shape[:2], model.config.vocab_size))
    return einsum("BTD,VD->BTV" if tied else "BTD,DV->BTV", x_BTD, head, out_sharding=spec)


def _sequence(block: Block, x_BTD: jax.Array) -> jax.Array:
    """The products of one block, attention by the kernel that the step uses."""
    q_BTKGH, k_BTKH, v_BTKH = _heads(block, x_BTD)
    B, T, _ = x_BTD.shape
    order_BT = jnp.broadcast_to(
        jnp.arange(T, dtype=jnp.int32), (B, T), out_sharding=jax.P(*jax.typeof(x_BTD).sharding.spec[:2])
    )
    names = ("qkv", "qkv", "qkv")
    q_BTKGH, k_BTKH, v_BTKH = map(checkpoint_name, (q_BTKGH, k_BTKH, v_BTKH), names)
    out_BTKGH, _ = NoCache().attend(
        q_BTKGH, k_BTKH, v_BTKH, positions_BT=order_BT, order_BT=order_BT, segment_ids_BT=None, span=None, ordered=True,
        scale=1.0, way=block.attn.way,
    )  # fmt: skip
    return _rest(block, out_BTKGH)


def _block(block: Block, layer: LayerCache, x_B1D: jax.Array) -> jax.Array:
    q_B1KGH, k_B1KH, v_B1KH = _heads(block, x_B1D)
    q_BKGH = (q_B1KGH + k_B1KH[:, :, :, None] + v_B1KH[:, :, :, None])[:, 0]  # so that each is used
    return _rest(block, layer.products(q_BKGH)[:, None])


def _heads(block: Block, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    attn, rules = block.attn, block.attn.rules
    (B, T, _), (_, K, G, H) = x_BTD.shape, attn.wq.shape
    heads = rules.spec(("batch", "seq", "kv_heads", "head_dim"), (B, T, K, H))
    grouped = rules.spec(("batch", "seq", "kv_heads", "groups", "head_dim"), (B, T, K, G, H))
    q_BTKGH = einsum("BTD,DKGH->BTKGH", x_BTD, attn.wq, out_sharding=grouped)
    k_BTKH = einsum("BTD,DKH->BTKH", x_BTD, attn.wk, out_sharding=heads)
    return q_BTKGH, k_BTKH, einsum("BTD,DKH->BTKH", x_BTD, attn.wv, out_sharding=heads)


def _rest(block: Block, out_BTKGH: jax.Array) -> jax.Array:
    mlp, rules = block.mlp, block.attn.rules
    (B, T), (D, F) = out_BTKGH.shape[:2], mlp.w_up.shape
    whole = rules.spec(("batch", "seq", "act_embed"), (B, T, D))
    wide = rules.spec(("batch", "seq", "mlp"), (B, T, F))
    x_BTD = checkpoint_name(einsum("BTKGH,KGHD->BTD", out_BTKGH, block.attn.wo, out_sharding=whole), "out")
    gate_BTF = checkpoint_name(einsum("BTD,DF->BTF", x_BTD, mlp.w_gate, out_sharding=wide), "mlp")
    up_BTF = checkpoint_name(einsum("BTD,DF->BTF", x_BTD, mlp.w_up, out_sharding=wide), "mlp")
    return einsum("BTF,FD->BTD", gate_BTF * up_BTF, mlp.w_down, out_sharding=whole)


def prefill_floor(model: Llama, x_BTD: jax.Array) -> jax.Array:
    """The products of a prompt, as `decode_floor`: attention by the kernel of the step, no head.

    Args:
      model: blocks in a list.
      x_BTD: the residual stream.

    Returns:
      [B, T, D].
    """
    for block in listed(model.blocks):
        x_BTD = _sequence(block, x_BTD)
    return x_BTD


def training_floor(model: Llama, x_BTD: jax.Array) -> PyTree:
    """The products of a training step and its gradient, with what the step's remat policy computes again.

    Args:
      model: blocks stacked.
      x_BTD: the residual stream of one microbatch.

    Returns:
      Gradients of the blocks, the head and the stream. The numbers mean nothing.
    """

    def blocks_of(blocks: PyTree, x_BTD: jax.Array) -> jax.Array:
        step = jax.checkpoint(
            lambda x_BTD, block: (_sequence(block, checkpoint_name(x_BTD, "block")), None),
            policy=REMAT[model.remat], prevent_cse=False,
        )  # fmt: skip
        return jax.lax.scan(step, x_BTD, blocks)[0]

    blocks: PyTree = model.blocks
    stand_ins = handles(model).blocks
    x_BTD, pull = jax.vjp(lambda stand_ins, x_BTD: blocks_of(attached(blocks, stand_ins), x_BTD), stand_ins, x_BTD)
    B, T, D = x_BTD.shape
    batch, seq, *_ = jax.typeof(x_BTD).sharding.spec
    length = jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)[1]
    chunks = max(1, length // TOKENS)
    split = x_BTD.reshape(B, T // length, chunks, length // chunks, D, out_sharding=jax.P(batch, seq, None, None, None))
    split = jnp.moveaxis(split, 2, 0).reshape(chunks, B, T // chunks, D, out_sharding=jax.P(None, batch, seq, None))
    head = (model.embed if model.config.tie_embeddings else model.lm_head).get_value()

    def chunk(total, x_BtD):
        logits_BtV, pull = jax.vjp(lambda head, x_BtD: _head(model, x_BtD, head), head, x_BtD)
        d_head, dx_BtD = pull(logits_BtV)
        return total + d_head, dx_BtD

    d_head, dx = jax.lax.scan(chunk, jnp.zeros_like(head), split)
    dx = dx.reshape(chunks, B, T // length, length // chunks, D, out_sharding=jax.P(None, batch, seq, None, None))
    dx_BTD = jnp.moveaxis(dx, 0, 2).reshape(B, T, D, out_sharding=jax.P(batch, seq, None))
    return *pull(dx_BTD), d_head
