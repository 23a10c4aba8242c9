"""A kernel for TPU that writes one key and one value a row into a cache, each row at its own slot.

XLA makes a loop over the rows of it (8 rows: 59,000 cycles, more than half of what else an 8B layer takes on 8 v5e), or
one small update a row, one after the other. Here the rows' copies run at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

TILE = 16  # slots: HBM keeps so many rows of bfloat16 together, and a copy moves whole tiles
ROWS = 16  # at most so many in one step of the kernel: 32 kv heads of 128 are then 4 MB


def fits(cache_BKSH: jax.Array) -> bool:
    """Whether the kernel can write into such a cache."""
    S, H = cache_BKSH.shape[2:]
    return cache_BKSH.dtype in (jnp.bfloat16, jnp.float32) and S % TILE == 0 and H % 128 == 0


def put(
    k_BKSH: jax.Array, v_BKSH: jax.Array, new_k_BKH: jax.Array, new_v_BKH: jax.Array, slots_B: jax.Array,
    *, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The cache of one device with each row's new key and value; slots outside the cache are dropped.

    Args:
      k_BKSH: keys, overwritten where the caller does not need them afterwards.
      v_BKSH: values, likewise.
      new_k_BKH: one key a row and head.
      new_v_BKH: one value a row and head.
      slots_B: int32.
      interpret: compute with JAX instead of compiling for a TPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, K, S, H = k_BKSH.shape
    rows = max(n for n in range(1, min(B, ROWS) + 1) if B % n == 0)
    new = pl.BlockSpec((rows, K * H), lambda i, slots: (i, 0))
    cache = pl.BlockSpec(memory_space=pltpu.HBM)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B // rows,),
        in_specs=[new, new, cache, cache],
        out_specs=[cache, cache],
        scratch_shapes=[
            pltpu.VMEM((2, rows, K * H), jnp.float32),
            pltpu.VMEM((2, rows, K, TILE, H), k_BKSH.dtype),
            pltpu.SemaphoreType.DMA((2, rows)),
        ],
    )
    tiles = 4 * B * K * TILE * H * k_BKSH.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, S=S),
        out_shape=[pltpu.HBM(x.shape, x.dtype) for x in (k_BKSH, v_BKSH)],
        grid_spec=grid,
        input_output_aliases={3: 0, 4: 1},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=tiles),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**21),
        interpret=interpret,
        name="put",
    )(slots_B, *(x.reshape(B, K * H).astype(k_BKSH.dtype) for x in (new_k_BKH, new_v_BKH)), k_BKSH, v_BKSH)


def _kernel(slots, new_k, new_v, _k, _v, k, v, wide, tiles, done, *, rows: int, S: int):
    """Reads the tile of each row's slot, changes one slot of it and writes it back."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    first = pl.program_id(0) * rows
    wide[0], wide[1] = new_k[...].astype(jnp.float32), new_v[...].astype(jnp.float32)

    def each_row(do):
        def body(row, _):
            slot = slots[first + row]
            start = pl.multiple_of(jnp.clip(slot, 0, S - 1) // TILE * TILE, TILE)
            for i, cache in enumerate((k, v)):
                do(cache.at[first + row, :, pl.ds(start, TILE)], i, row, slot - start)
            return 0

        jax.lax.fori_loop(0, rows, body, 0)

    def read(there, i, row, at):
        pltpu.make_async_copy(there, tiles.at[i, row], done.at[i, row]).start()

    def change(there, i, row, at):
        pltpu.make_async_copy(there, tiles.at[i, row], done.at[i, row]).wait()
        tile_KTH = tiles[i, row].astype(jnp.float32)  # registers select 32 bits
        new_K1H = wide[i, pl.ds(row, 1)].reshape(tile_KTH.shape[0], 1, tile_KTH.shape[2])
        slot_KTH = jax.lax.broadcasted_iota(jnp.int32, tile_KTH.shape, 1)
        tiles[i, row] = jnp.where(slot_KTH == at, new_K1H, tile_KTH).astype(tiles.dtype)
        pltpu.make_async_copy(tiles.at[i, row], there, done.at[i, row]).start()

    def finish(there, i, row, at):
        pltpu.make_async_copy(tiles.at[i, row], there, done.at[i, row]).wait()

    for do in (read, change, finish):
        each_row(do)
