"""Whole transformers: attentions that compute with codes, and the recipes of the papers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_nas.binary.attention import CodedAttention, attentions
from lightning_nas.binary.forms import Activations, Weights
from lightning_nas.binary.transform import binarize, layers, release
from lightning_nas.errors import NASError, NoMatchError, UnsupportedError

__all__ = ["attention_layers", "binarize_attention", "binarize_transformer", "release_attention", "set_parts"]

Method = Literal["bivit", "bit", "bipft"]
_NAME = "lightning_nas_binary"  # of the attention function among those of transformers


def attention_layers(model: nn.Module) -> dict[str, CodedAttention]:
    """What computes with codes in each attention of a network, by the name of the attention."""
    return {
        name: inside
        for name, module in model.named_modules()
        if isinstance(inside := getattr(module, "binary_attention", None), CodedAttention)
    }


def binarize_attention(model: nn.Module, method: str | Method = "bivit", **settings: Any) -> nn.Module:
    """Let the attentions of a network compute with codes, in place.

    Of timm: those of ViT, DeiT and Swin; of transformers: every self-attention that calls the library's
    attention function, with as many heads of keys as of queries: BERT, RoBERTa, DistilBERT, ViT, DeiT, Swin.
    Names, identity and shapes of the parameters stay; what is learned besides lies below
    ``<attention>.binary_attention``, and a checkpoint of the plain network still loads.

    Args:
        model: the network.
        method: ``"bivit"``, ``"bit"``, ``"bipft"``, or one registered in ``binary.attentions``.
        **settings: of the method, as ``threshold=0.25`` of BiViT's.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown method or a setting out of range.
        NoMatchError: for a network without such attentions.
        UnsupportedError: for heads that share keys.
        NASError: if its attentions compute with codes already. In all cases nothing has changed.
    """
    kind = attentions[method]
    inside: nn.Module = getattr(model, "_orig_mod", model)
    if attention_layers(inside):
        raise NASError("binarize_attention: these attentions compute with codes already; release them first.")
    found = [(name, m, w) for name, m in inside.named_modules() if (w := _width(m)) is not None]
    if not found:
        raise NoMatchError(
            f"binarize_attention: no attention in this {type(inside).__name__} that is known. Known are "
            "timm's ViT, DeiT and Swin, and networks of transformers that use its attention functions."
        )
    for name, module, _ in found:
        if getattr(module, "num_key_value_groups", 1) != 1 or getattr(module, "is_decoder", False):
            raise UnsupportedError(
                f"binarize_attention: {name or type(module).__name__} is of a decoder or shares keys among "
                "heads; attentions of encoders can be binary."
            )
    made = [kind(width, **settings) for _, _, width in found]
    for (_, module, _), coded in zip(found, made, strict=True):
        like = next(module.parameters())
        own: Any = type(module)
        module.__class__ = _coded(own)
        module.binary_attention = coded.to(like.device).train(module.training)
        config: Any = getattr(module, "config", None)
        if config is not None and config._attn_implementation != _NAME:
            module.__dict__["_attention_before"] = config._attn_implementation
            config._attn_implementation = _NAME
    return model


def release_attention(model: nn.Module) -> nn.Module:
    """Give the attentions of a network their own computation back."""
    for module in model.modules():
        if isinstance(getattr(module, "binary_attention", None), CodedAttention):
            del module.binary_attention
            module.__class__ = type(module).__bases__[1]
            if (before := module.__dict__.pop("_attention_before", None)) is not None:
                config: Any = module.config
                config._attn_implementation = before
    return model


def binarize_transformer(
    model: nn.Module,
    method: Method = "bivit",
    *,
    weights: int = 1,
    activations: int = 1,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    attention: bool = True,
    relu: bool | None = None,
) -> nn.Module:
    """Make a transformer binary as a paper does, in place: its layers, and with them its attentions.

    ``"bivit"``: centred weights with a learned scale for each channel, straight-through gradients, and
    softmax-aware attention. ``"bit"``: one scale a layer, elastic activations and attention, ReLU where the
    network had GELU, so that codes of 0 and 1 fit. ``"bipft"``: as BiT, with its estimates of what codes
    leave out.

    Args:
        model: of timm or transformers.
        method: one of the three.
        weights: 1, or 2 for ternary ones.
        activations: 1; or 32: inputs stay real, and so do the attentions.
        include: as in :func:`~lightning_nas.binary.binarize`.
        exclude: likewise.
        attention: whether attentions compute with codes where activations do.
        relu: whether GELU becomes ReLU, which changes the network's function; None: as the paper does.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown method, or bits out of range.
        NoMatchError: as :func:`~lightning_nas.binary.binarize` and :func:`binarize_attention`.
        UnsupportedError: likewise.
    """
    if method not in get_args(Method):
        raise ValueError(f"binarize_transformer: method must be one of {get_args(Method)}, got {method!r}.")
    is_bivit = method == "bivit"
    inside: nn.Module = getattr(model, "_orig_mod", model)
    binarize(
        model,
        "ste" if is_bivit else "identity",
        include=include,
        exclude=exclude,
        weights=Weights(weights, "learned", treatment="centred")
        if is_bivit
        else Weights(weights, "layer", treatment=_about_mean),
        activations=Activations(1, estimator="ste") if activations == 1 else activations,
    )
    if attention and activations == 1:
        try:
            binarize_attention(inside, method)
        except BaseException:
            release(inside)
            raise
    if (not is_bivit and activations == 1) if relu is None else relu:
        _with_relu(inside)
    return model


def set_parts(model: nn.Module, *, attention: bool, mlp: bool) -> None:
    """Let the layers of attentions, and all others, run with codes or not; BiViT binarizes one, then both.

    Args:
        model: with binary layers.
        attention: whether the attentions and the layers inside them use codes.
        mlp: whether the other binary layers do.

    Raises:
        NASError: if the network has no binary layer.

    Reference: He et al., BiViT, ICCV 2023, section 3.3 (cross-layer binarization).
    """
    found, coded = layers(model), attention_layers(model)
    if not found:
        raise NASError(f"set_parts: this {type(model).__name__} has no binary layer. Binarize it first.")
    for part in coded.values():
        part.is_on = attention
    for name, layer in found.items():
        inside = any("attn" in piece or "attention" in piece.lower() for piece in name.split("."))
        is_on = attention if inside else mlp
        layer.weight_bits = layer.weights.bits if is_on else 32
        layer.input_bits = layer.activations.bits if is_on else 32


def _about_mean(weight: Tensor) -> Tensor:
    """All weights of a layer without their mean."""
    return weight - weight.mean()


# --- attentions of the libraries


def _width(module: nn.Module) -> int | None:
    """The width of the tokens of a self-attention that is known; None for other modules."""
    if _timm_kind(type(module)) is not None:
        return int(module.qkv.in_features)  # type: ignore[union-attr, arg-type]
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):  # by the library's decorators
        forward = forward.__wrapped__
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    for name in ("query", "q_proj", "q_lin", "q"):
        if isinstance(projection := getattr(module, name, None), nn.Linear):
            return int(projection.in_features)
    return None


def _timm_kind(cls: type[nn.Module]) -> str | None:
    from timm.layers.attention import Attention
    from timm.models.swin_transformer import WindowAttention

    return "window" if cls is WindowAttention else "global" if cls is Attention else None


class _Coded(nn.Module):
    """An attention that has a :class:`CodedAttention`."""

    binary_attention: CodedAttention

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint of the plain network fits: what it lacks stays as it is."""
        own = self.binary_attention.state_dict(prefix=f"{prefix}binary_attention.")
        if not own.keys() & state_dict.keys():
            state_dict.update({name: tensor.detach().clone() for name, tensor in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, and no import finds it: a pickle holds how it was made.
        return (_blank, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:])


def _blank(original: Any) -> nn.Module:
    cls = _coded(original)
    return cls.__new__(cls)


@cache
def _coded(original: Any) -> type[nn.Module]:
    kind = _timm_kind(original)
    forward = {"window": _window_forward, "global": _global_forward, None: _library_forward}[kind]
    if kind is None:
        _register()  # also for one that comes from a pickle
    members: dict[str, Any] = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "forward": forward,
    }
    return type(f"Binary{original.__name__}", (_Coded, original), members)


def _heads(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return query, key, value


def _global_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """What timm's ``Attention`` computes, with codes between its projections."""
    query, key, value = _heads(self, x)
    added = attn_mask
    if added is not None and added.dtype == torch.bool:
        added = torch.zeros_like(added, dtype=x.dtype).masked_fill(~added, torch.finfo(x.dtype).min)
    if is_causal:
        future = x.new_full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
        added = future if added is None else added + future
    context, _ = self.binary_attention(
        self.q_norm(query), self.k_norm(key), value, self.scale, added, self.attn_drop.p, x
    )
    context = self.norm(context.transpose(1, 2).flatten(2))
    if self.gate is not None:
        context = context * self.gate(x).sigmoid()
    out: Tensor = self.proj_drop(self.proj(context))
    return out


def _window_forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What timm's ``WindowAttention`` computes, with codes between its projections."""
    query, key, value = _heads(self, x)
    added = self._get_rel_pos_bias()
    if mask is not None:
        added = added + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
    context, _ = self.binary_attention(query, key, value, self.scale, added, self.attn_drop.p, x)
    out: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))
    return out


def _library_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """An attention of transformers: what it calls for is registered below, and finds its tokens here."""
    tokens = args[0] if args else kwargs["hidden_states"]
    self.binary_attention.__dict__["tokens"] = tokens
    try:
        return super(type(self), self).forward(*args, **kwargs)
    finally:
        self.binary_attention.__dict__.pop("tokens", None)


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers for attentions with codes; others get the library's own."""
    coded = getattr(module, "binary_attention", None)
    if coded is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        given: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return given
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = coded.__dict__.get("tokens")
    context, weights = coded(query, key, value, factor, attention_mask, dropout, tokens)
    return context.transpose(1, 2).contiguous(), weights


def _with_relu(model: nn.Module) -> None:
    """GELU becomes ReLU, which never is negative: behind it codes of 0 and 1 carry what signs could not."""
    from transformers.activations import GELUActivation

    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GELU | GELUActivation):
                setattr(module, name, nn.ReLU())
        if callable(gelu := module.__dict__.get("intermediate_act_fn")) and not isinstance(gelu, nn.Module):
            module.intermediate_act_fn = nn.ReLU()  # type: ignore[assignment]
