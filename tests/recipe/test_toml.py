"""Recipes as TOML files."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fastmp import models, recipe
from fastmp.recipe import TrainConfig


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lr=st.none() | st.floats(0, 10),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.none() | st.integers(1, 9999),
    model=st.sampled_from([*models.MODELS, 'odd "quoted\\name:f']),
    max_grad_norm=st.floats(0, exclude_min=True),
    out=st.none() | st.just("some/where"),
)
def test_config_files_round_trip(tmp_path_factory, out, **fields):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    config = TrainConfig(**fields, out=out and path.parent / out)
    commands = ["fastmp train --lr 1", "fastmp train --out 'two\nlines\x1b' --resume"]
    recipe.write_toml(config, path, commands)
    assert recipe.read_toml(path) == config
    assert recipe.commands_in(path) == [commands[0], "fastmp train --out 'two lines ' --resume"]
