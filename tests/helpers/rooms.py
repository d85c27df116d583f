"""The order of the rooms of `ppvision`, which imports follow."""

# From the ground up: a module imports from its own room and from those that this list names before
# it. The longest name that a module begins with is its room.
ROOMS = (
    "ppvision.moved",
    "ppvision",  # the Python face; what it hands on is imported later
    "ppvision.errors",
    "ppvision.forms.paddle_private",
    "ppvision.environment",
    "ppvision.arguments",
    "ppvision.precision",
    "ppvision.tables",
    "ppvision.files",
    "ppvision.console",
    "ppvision.safe_tensors",
    "ppvision.safe_yaml",
    "ppvision.configs",
    "ppvision.schema",
    "ppvision.remote_session",
    "ppvision.remote",
    "ppvision.remote_cache",
    "ppvision.data",
    "ppvision.metrics",
    "ppvision.deploy.run",
    "ppvision.deploy",  # the Python face of the three rooms in it
    "ppvision.nn",
    "ppvision.quant",
    "ppvision.models",
    "ppvision.zoo",
    "ppvision.deploy.run.zoo_folder",
    "ppvision.forms",
    "ppvision.deploy.verify",
    "ppvision.deploy.write",
    "ppvision.engine",
    "ppvision.plugins",
    "ppvision.tasks",
    "ppvision.doctor",
    "ppvision.dashboard",
    "ppvision.cli",
    "ppvision.__main__",
)
