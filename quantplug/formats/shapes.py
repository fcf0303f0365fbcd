"""Which weight shapes a block format can pack."""


def shape_problem(shape: tuple[int, ...], out_block: int = 1, in_block: int = 1) -> str | None:
    """Why a weight of this shape does not divide into blocks of [out_block, in_block]; None when it does."""
    if len(shape) != 2:
        return f"shape {list(shape)} is not [out_features, in_features]"
    sizes = (("out_features", shape[0], out_block), ("in_features", shape[1], in_block))
    empty = [f"{axis} is 0" for axis, size, _ in sizes if size == 0]
    uneven = [
        f"{axis} {size} is not a multiple of the block size {block}" for axis, size, block in sizes if size % block
    ]
    return "; ".join(empty + uneven) or None
