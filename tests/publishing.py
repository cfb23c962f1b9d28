"""How tests publish, and the card of the repository they publish to."""

from peft_blueprint.publish.commit import publish


CARD = "---\nlicense: mit  # as the data\n---\n# My model\n\nA person wrote this.\n"


def put(blueprint, hub, repo_id="tiny/llama", **wishes):
    return publish(blueprint, repo_id, **{"token": "hf_mine", "endpoint": hub.endpoint, "picture": False, **wishes})
