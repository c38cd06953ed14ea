"""What config.json says in several ways: rotary positions, windows, T5's MLP. To the values of our configs and back."""

SCALINGS = {  # rope_type: what the tuple of DecoderConfig.rope_scaling is read from
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers


def _scaling(rope: dict):
    """The tuple that one object of rotary keys asks for; None for what the decoder does not compute."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind not in tuple(SCALINGS):  # it may be of any type
        return None
    numbers = tuple(rope.get(name) for name in SCALINGS[kind])
    sound = all(type(x) in (int, float) and 0 < x <= 1e30 for x in numbers)
    return numbers if sound and (len(numbers) == 1 or numbers[1] < numbers[2]) else None


def read_rope(raw: dict, family, refuse) -> dict:
    """rope_scaling as a tuple, and rope_theta, partial_rotary_factor, rope_local_base_freq where the objects say them.

    Of two objects the older, rope_scaling, tells the scaling, as in transformers. refuse(key, value) raises.
    """
    found = {"rope_scaling": ()}
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            refuse(key, rope)
        own = rope
        if any(isinstance(x, dict) for x in rope.values()):  # one for each kind of layer
            own, local = (rope.get(kind) or {} for kind in (FULL, SLIDING))
            sound = isinstance(own, dict) and isinstance(local, dict) and _scaling(local) == ()
            if "local_theta" not in family.fields or rope.keys() - {FULL, SLIDING} or not sound:
                refuse(key, rope)
            if local.keys() - {"rope_type", "type", "rope_theta"}:
                refuse(key, rope)
            found |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        scaling = _scaling(own)
        if scaling is None or (scaling and not family.rope):
            refuse(key, rope)
        if key == "rope_parameters":
            found |= {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if own.get(name) is not None}
        if own:
            found["rope_scaling"] = scaling
    return found


def write_rope(raw: dict, family, config) -> dict:
    """raw with its rotary keys, in old and new spelling. Inverse of `read_rope`."""
    raw, new = dict(raw), {key: raw[key] for key in family.rope}
    for key, old in family.rope.items():
        raw[old] = raw.pop(key)
    scaling = {"rope_type": "default"}
    for kind, names in SCALINGS.items():
        if len(names) == len(config.rope_scaling):
            scaling = {"rope_type": kind} | dict(zip(names, config.rope_scaling))
            raw["rope_scaling"] = scaling
    raw["rope_parameters"] = new | scaling
    if "local_theta" in family.fields:
        local = raw["rope_local_base_freq"] or config.rope_theta  # None is not in its words
        raw |= {"rope_local_base_freq": local}
        raw["rope_parameters"] = {FULL: new | scaling, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return raw


def everywhere(said: dict, layer: int):
    """Every layer has the window, if there is one: Mistral, Phi-3, and the families that can have none."""
    return bool(said["sliding_window"])


def from_a_layer_on(said: dict, layer: int):
    """Qwen: None where use_sliding_window is true and max_window_layers is not there."""
    if not (said["sliding_window"] and said.get("use_sliding_window", False)):
        return False
    first = said.get("max_window_layers")
    return layer >= first if type(first) is int else None


def every_other(said: dict, layer: int):
    """Gemma-2."""
    return layer % 2 == 0


def all_but_each_nth(said: dict, layer: int):
    """Gemma-3."""
    n = said.get("sliding_window_pattern", 6)
    return (layer + 1) % n > 0 if type(n) is int and n > 0 else None


def read_windows(raw: dict, family, layers: int, refuse) -> tuple:
    """DecoderConfig.windows of config.json. refuse(key, value) raises.

    `family.slides`, one of the above, tells the layers apart where layer_types does not; None where nothing tells.
    """
    key, default = family.fields.get("windows", ("sliding_window", None))
    said = {k: v for k, v in raw.items() if v is not None} | {"sliding_window": raw.get(key, default)}
    if "windows" not in family.fields and said.get("use_sliding_window") is False:
        said["sliding_window"] = None
    size, types = said["sliding_window"], said.get("layer_types")
    if not size and types is None:
        return ()
    if layers > MOST_LAYERS:  # before a list is made of it
        refuse("num_hidden_layers", layers)
    slides = [family.slides(said, layer) for layer in range(layers)]
    if types is not None:
        known = isinstance(types, list) and len(types) == layers and all(kind in (FULL, SLIDING) for kind in types)
        told = [kind == SLIDING for kind in types] if known else None
        if not known or (family.slides is everywhere and told != slides):  # there, transformers does not read it
            refuse("layer_types", types)
        slides = told
    sound = "windows" in family.fields and type(size) is int and 0 < size < 2**31
    if None in slides or (any(slides) and not sound):
        refuse("sliding_window", size)
    return tuple(size if slide else 0 for slide in slides) if any(slides) else ()


def write_windows(family, config) -> dict:
    """Keys of config.json, for a family that has windows. Inverse of `read_windows`."""
    size = max(config.windows, default=None)
    raw = {"sliding_window": size}
    if family.slides is from_a_layer_on:
        raw["use_sliding_window"] = size is not None
    slides = [window > 0 for window in config.windows] or [False] * config.layers
    if slides != [family.slides(raw, layer) for layer in range(config.layers)]:
        raw["layer_types"] = [SLIDING if slide else FULL for slide in slides]
    return raw


def read_forward(raw: dict) -> dict:
    """T5's dense_act_fn and is_gated_act, which follow from feed_forward_proj, as in transformers."""
    word = raw.get("feed_forward_proj") or {"t5": "relu", "mt5": "gated-gelu"}[raw["model_type"]]
    gated = isinstance(word, str) and word.startswith("gated-")
    if gated:
        word = "gelu_new" if word == "gated-gelu" else word.removeprefix("gated-")
    return {"is_gated_act": gated, "dense_act_fn": word}


def write_forward(raw: dict) -> dict:
    """Inverse of `read_forward`."""
    gated, word = raw["is_gated_act"], raw["dense_act_fn"]
    return {"feed_forward_proj": f"gated-{'gelu' if word == 'gelu_new' else word}" if gated else word}
