"""PaddleDetection: importing this module makes its reading of configurations safe.

PaddleDetection reads configurations, `-o` options and its compression files with a loader that
runs whatever a file names (`!!python/object/apply:os.system`). Afterwards it knows plain values
and PaddleDetection's own tags (`!LinearWarmup {...}`), and refuses the rest. `!Callable`, which
calls any function by its name, is refused as well.
"""

try:
    from ppdet import slim
    from ppdet.core import workspace
    from ppdet.utils import cli
except ImportError as error:
    raise ImportError(
        f"ppvision.plugins.paddledet needs PaddleDetection, which does not import ({error}); "
        "install it with: pip install --no-deps paddledet==2.6.0"
    ) from error

from typing import IO

import yaml

_REFUSED = "!Callable"


class _Loader(yaml.SafeLoader):
    """YAML's plain values and the tags of PaddleDetection's classes."""


def _registered(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> object:
    # PaddleDetection's `serializable` enters every class's constructor into YAML's own loader.
    known = yaml.Loader.yaml_constructors.get(f"!{suffix}")
    if known is None or f"!{suffix}" == _REFUSED:
        raise yaml.constructor.ConstructorError(
            None, None, f"expected a tag of PaddleDetection's, got '!{suffix}'", node.start_mark
        )
    return known(loader, node)


_Loader.add_multi_constructor("!", _registered)


def load_yaml(stream: IO[str] | str) -> object:
    """Read one YAML document of PaddleDetection's.

    Raises:
        yaml.YAMLError: not YAML, or a tag that is neither plain nor PaddleDetection's.
    """
    return yaml.load(stream, Loader=_Loader)


class _SafeYaml:
    """YAML as PaddleDetection's modules see it: `yaml.Loader` is the safe one."""

    Loader = _Loader

    def __getattr__(self, name: str) -> object:
        return getattr(yaml, name)


# The name `yaml` inside these modules alone; YAML itself stays as it is for everyone else.
for _module in (workspace, cli, slim):
    _module.yaml = _SafeYaml()
