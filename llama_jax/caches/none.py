"""No cache: tokens that see one another only, as in training."""

from __future__ import annotations

import jax

from llama_jax.ops.attention import Way, dot_product_attention


class NoCache:
    """Stands where a layer has no cache: `attend` and `settle` of `LayerCache`, and nothing is kept."""

    def attend(
        self, q_BTKGH, k_BTKH, v_BTKH, *, positions_BT, order_BT, segment_ids_BT, span, ordered, scale: float, way: Way
    ) -> tuple[jax.Array, NoCache]:
        """Each token sees those before it in its row, and in its segment."""
        with jax.named_scope("cache"):
            k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        with jax.named_scope("attention"):
            out_BTKGH = dot_product_attention(
                q_BTKGH, k_BKTH, v_BKTH, slots_BT=order_BT, segment_ids_BT=segment_ids_BT, ordered=True, scale=scale,
                implementation=way.implementation,
            )  # fmt: skip
        return out_BTKGH, self

    def settle(self, x_BTD: jax.Array) -> tuple[jax.Array, None]:
        """There is nothing to write."""
        return x_BTD, None
