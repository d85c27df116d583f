"""The forms of SDN that the benchmarks compare, on a CPU and on a GPU."""

# Options of `SemanticDiffusionBackbone` (both ours and that of `ppvision.plugins.paddleseg`); None
# is the backbone alone.
FORMS: dict[str, dict | None] = {
    "none": None,
    "convolution": {"operator": "convolution", "similarity": "gaussian"},
    "central": {"similarity": "none"},
    "sdn": {"similarity": "gaussian"},
    "classes": {"guidance": "classes", "similarity": "product"},
    "classes_finest": {"guidance": "classes", "similarity": "product", "levels": [0, 1]},
    # The rest is not in the first comparison.
    "central_auxiliary": {"guidance": "classes", "similarity": "none"},
    "sdn_detached": {"similarity": "gaussian", "detach_guidance": True},
    "classes_detached": {"guidance": "classes", "similarity": "product", "detach_guidance": True},
    "boundary": {"guidance": "boundary", "similarity": "product"},
    "sdn_two_steps": {"similarity": "gaussian", "steps": 2},
    "classes_two_steps": {"guidance": "classes", "similarity": "product", "steps": 2},
}
COMPARED = ("none", "convolution", "central", "sdn", "classes", "classes_finest")
