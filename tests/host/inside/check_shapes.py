"""What was made for another model is told in a sentence before a worker is touched, and the next run works."""

import pytest
import torch
from comfy_xdit_nodes.checkpoint import open_checkpoint
from comfy_xdit_nodes.parity import models as tiny
from comfy_xdit_nodes.patcher import from_checkpoint

KINDS = ("sd3", "flux", "pixart")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, models):
    return from_checkpoint(open_checkpoint(str(models / f"{kind}.safetensors")))


def refused(kind, model, fake, sentence, **inputs):
    with pytest.raises(ValueError, match=sentence) as told:
        tiny.sample(model, **tiny.fitted(kind, {}) | inputs)
    assert "\n" not in str(told.value) and not fake.log, "a worker was touched"
    assert tiny.sample(model, **tiny.fitted(kind, {})).isfinite().all()


CHANNELS = {"sd3": 16, "flux": 16, "pixart": 4}


@pytest.mark.parametrize("dims", [3, 5])
def test_a_latent_of_other_dims(dims, kind, model, fake):
    channels = CHANNELS[kind]
    shape = {3: (1, channels, 256), 5: (1, channels, 1, 16, 16)}[dims]
    sentence = r"a latent of shape \[1, .*can't be sampled with"
    refused(kind, model, fake, sentence, latent_image={"samples": torch.ones(shape)})


def test_a_latent_of_other_channels(kind, model, fake):
    latent = {"samples": torch.ones(1, 7, 64, 64)}
    refused(kind, model, fake, "a latent of 7 channels does not fit this", latent_image=latent)


def changed(tensor=None, **options):
    (text, own), *rest = tiny.conditioning()
    return [[text if tensor is None else tensor, own | options], *rest]


CONDITIONINGS = {
    "text of 9 channels does not fit this": changed(torch.zeros(1, 5, 9)),
    r"the positive conditioning has text of shape \[5, 64\]": changed(torch.zeros(5, 64)),
    r"the positive conditioning has text of shape \[1, 0, 64\]": changed(torch.zeros(1, 0, 64)),
}


@pytest.mark.parametrize("sentence", CONDITIONINGS)
def test_text_of_another_model(sentence, kind, model, fake):
    refused(kind, model, fake, sentence, positive=CONDITIONINGS[sentence])


@pytest.mark.parametrize("pooled", [torch.zeros(1, 7), torch.zeros(48)], ids=["short", "flat"])
@pytest.mark.parametrize("kind", ["sd3", "flux"], indirect=True)
def test_pooled_text_of_another_model(pooled, kind, model, fake):
    conditioning = changed(pooled_output=pooled)
    refused(kind, model, fake, "the negative conditioning has pooled text of shape", negative=conditioning)


@pytest.mark.parametrize("kind", ["sd3"], indirect=True)
def test_a_latent_beyond_the_table_of_positions(kind, model, fake):
    latent = {"samples": torch.ones(1, 16, 100, 16)}
    refused(kind, model, fake, "beyond the table of positions of SD3 / SD3.5", latent_image=latent)


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_references(kind, model, fake):
    five = {"reference_latents": [torch.zeros(1, 16, 1, 8, 8)]}
    refused(kind, model, fake, r"a reference latent of shape \[1, 16, 1, 8, 8\]", positive=changed(**five))
    fake.log.clear()
    method = {"reference_latents_method": "index_timestep_zero"}
    refused(kind, model, fake, "use offset, index or uxo/uno", positive=changed(**method))
