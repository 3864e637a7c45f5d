"""Captioned glyphs, and the network that reads captions."""

import pytest
import torch

import data
from data import DataError
from data.glyphs import CHARACTERS, FAMILIES, attributes, captions, glyphs
from guidance import classifier_free
from models import MLP, CaptionedUNet, CaptionEncoder, ScoreModel
from numerics import SampleStreams, UserError
from samplers import DDIM
from sde_lib import VPSDE

NAMES = ("bold italic serif 3", "sans 3", "serif italic bold 3", "bold sans 3")


class TestGlyphs:
    few = glyphs(per_combination=2, tests=1, held_out=43)

    def test_captions_say_what_classes_are_made_of(self):
        names = captions()
        assert len(names) == len(set(names)) == 432 and "bold italic serif 3" in names and "sans Q" in names
        parts = attributes(torch.arange(432))
        for i in range(0, 432, 7):
            words = names[i].split()
            assert words[-1] == CHARACTERS[parts["character"][i]]
            assert words[-2] == list(FAMILIES)[parts["family"][i]]
            assert ("bold" in words, "italic" in words) == (bool(parts["bold"][i]), bool(parts["italic"][i]))

    def test_held_out_combinations_are_new_but_what_they_are_made_of_is_not(self):
        trained = set(self.few.split("train").labels.tolist())
        new = set(self.few.split("combinations").labels.tolist())
        assert len(trained) == 389 and len(new) == 43 and not trained & new
        assert set(self.few.split("test").labels.tolist()) == trained
        seen, held_out = (attributes(torch.tensor(sorted(s))) for s in (trained, new))
        faces = {tuple(v) for v in torch.stack([seen[k] for k in ("family", "bold", "italic")], 1).tolist()}
        assert len(faces) == 12
        for name in held_out:
            assert set(held_out[name].tolist()) <= set(seen[name].tolist())

    def test_pictures_look_as_they_are_called(self):
        train = self.few.split("train")
        x, parts = train.x.float() / 255, attributes(train.labels)
        assert x.shape[1:] == (1, 16, 16) and float(x.flatten(1).amax(1).min()) > 0.3
        border = torch.cat([x[:, 0, [0, -1], :].flatten(1), x[:, 0, :, [0, -1]].flatten(1)], 1)
        assert float(border.mean()) < 0.02  # hardly anything is cut off
        ink = x.mean(dim=(1, 2, 3))
        assert float(ink[parts["bold"] == 1].mean()) > 1.15 * float(ink[parts["bold"] == 0].mean())
        # an upright I is narrower above one another than a slanted one
        letter = parts["character"] == CHARACTERS.index("I")
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

        def slant(picture):
            w = picture[0] / picture.sum()
            r, c = (w * rows).sum(), (w * columns).sum()
            return float((w * (rows - r) * (columns - c)).sum())

        tilted = torch.tensor([slant(p) for p in x[letter]])
        italic = parts["italic"][letter] == 1
        assert float(tilted[italic].mean()) < float(tilted[~italic].mean()) - 0.5

    def test_the_seed_decides_and_numbers_are_checked(self):
        again, other = glyphs(per_combination=2, tests=1), glyphs(per_combination=2, tests=1, seed=1)
        assert torch.equal(again.split("train").x, self.few.split("train").x)
        assert not torch.equal(other.split("train").x, self.few.split("train").x)
        assert data.create("glyphs", per_combination=1, tests=1).num_classes == 432
        for bad in ({"per_combination": 0}, {"held_out": 400}, {"tests": 0}):
            with pytest.raises(DataError, match=next(iter(bad))):
                glyphs(**bad)


def network(seed=0, names=NAMES, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = CaptionedUNet(class_names=names, image_size=8, channels=8, text_width=16, text_depth=1, **options)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    return net.double().eval().requires_grad_(False)


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABEL = torch.zeros(4, dtype=torch.float64)
EACH = torch.arange(4)


class TestCaptionedNetwork:
    def test_permuting_the_captions_changes_the_outputs_and_the_samples(self):
        net = network()
        own, other = net(X, LABEL, EACH), net(X, LABEL, EACH.flip(0))
        assert float((own - other).flatten(1).abs().amax(1).min()) > 1e-3
        model = ScoreModel(net, VPSDE())
        drawn = [
            DDIM(steps=4)(
                model.sde, model.condition(c), (4, 1, 8, 8), generator=SampleStreams(0), dtype=torch.float64
            ).x
            for c in (EACH, EACH.flip(0))
        ]
        assert float((drawn[0] - drawn[1]).flatten(1).abs().amax(1).min()) > 1e-3

    def test_both_ways_in_are_used(self):
        net = network()
        own = net(X, LABEL, EACH)
        for silent in (net.pooled, net.middle.attention.words.output):
            kept = silent.weight.data.clone()
            silent.weight.data.zero_()
            assert float((net(X, LABEL, EACH) - own).abs().max()) > 1e-4
            if silent is net.pooled:  # attention alone still tells the captions apart
                assert float((net(X, LABEL, EACH) - net(X, LABEL, EACH.flip(0))).abs().max()) > 1e-4
            silent.weight.data.copy_(kept)

    def test_words_know_where_they_are(self):
        net = network()
        own = net(X, LABEL, EACH)
        for attention in (net.encoder[-1].attentions[0], net.middle.attention):
            kept = attention.places.data.clone()
            attention.places.data.copy_(kept.roll(1, dims=-1))
            assert float((net(X, LABEL, EACH) - own).abs().max()) > 1e-3
            attention.places.data.copy_(kept)
        # of images that are not square, places in between
        wide = net(torch.cat([X, X], dim=-1)[..., :12], LABEL, EACH)
        assert wide.shape == (4, 1, 8, 12) and bool(wide.isfinite().all())

    def test_padding_is_not_seen(self):
        net = network()
        own = net(X, LABEL, EACH)
        net.captions.words.weight.data[0] += torch.linspace(-50, 80, 16)
        torch.testing.assert_close(net(X, LABEL, EACH), own, rtol=0, atol=1e-12)
        net.captions.words.weight.data[1] += torch.linspace(-1, 2, 16)  # but the first token is
        assert float((net(X, LABEL, EACH) - own).abs().max()) > 1e-4

    def test_words_have_places_and_unseen_orders_are_captions_too(self):
        encoder = network().captions
        pooled = encoder(EACH, 4).pooled
        assert float((pooled[0] - pooled[2]).abs().max()) > 1e-4  # the same words in another order
        assert encoder(EACH, 4).mask.sum(dim=1).tolist() == [5, 3, 5, 4]

    def test_no_class_is_the_empty_caption(self):
        net = network()
        torch.testing.assert_close(net(X, LABEL), net(X, LABEL, torch.full((4,), 4)))
        assert net.captions(None, 2).mask.sum(dim=1).tolist() == [1, 1]
        model = ScoreModel(net, VPSDE())
        torch.testing.assert_close(model.condition(None)(X, torch.tensor(0.5)), model(X, torch.tensor(0.5)))
        assert model.num_classes == 4

    def test_a_saved_one_comes_back(self, tmp_path):
        model = ScoreModel(network().float(), VPSDE())
        model.save_pretrained(tmp_path)
        again = ScoreModel.from_pretrained(tmp_path)
        x, t = X.float(), torch.tensor(0.4)
        torch.testing.assert_close(again.score(x, t, EACH), model.score(x, t, EACH))

    def test_a_saved_one_reads_what_it_read(self, tmp_path):
        model = ScoreModel(network().float(), VPSDE())
        x, t = X.float(), torch.tensor(0.4)
        for texts in (["sans"], ["3 sans", ""], [*NAMES, "bold"]):
            read = model.reading(texts)
            read.save_pretrained(tmp_path / str(len(texts)))
            again = ScoreModel.from_pretrained(tmp_path / str(len(texts)))
            assert again.num_classes == len(texts)
            for k in range(len(texts)):
                torch.testing.assert_close(again.condition(k)(x, t), read.condition(k)(x, t))
            again = again.reading(["bold sans"])  # of the words that it was trained on
            torch.testing.assert_close(again.condition(0)(x, t), model.reading(["bold sans"]).condition(0)(x, t))

    def test_any_caption_of_known_words_is_read(self):
        net = network()
        read = net.reading(("sans bold 3", "bold sans 3", "", "sans"))
        own = net(X, LABEL, EACH)
        torch.testing.assert_close(
            read(X[3:], LABEL[3:], torch.tensor([1])), own[3:], rtol=0, atol=1e-12
        )  # a class's own caption
        torch.testing.assert_close(read(X, LABEL, EACH * 0 + 2), net(X, LABEL), rtol=0, atol=1e-12)  # the empty one
        torch.testing.assert_close(read(X, LABEL), net(X, LABEL), rtol=0, atol=1e-12)
        other = read(X[3:], LABEL[3:], torch.tensor([0]))
        assert float((other - own[3:]).abs().max()) > 1e-3  # an order that no class has
        assert read.num_classes == 4 and {id(p) for p in read.parameters()} == {id(p) for p in net.parameters()}
        torch.testing.assert_close(net(X, LABEL, EACH), own, rtol=0, atol=1e-12)  # and the network reads what it read
        with pytest.raises(
            UserError, match=r"'Bold' in 'Bold 3', did you mean 'bold'\?; expected words of: 3, bold, italic, sans"
        ):
            net.reading(["Bold 3"])
        with pytest.raises(UserError, match="5 words, .*expected at most 4"):
            net.reading(["bold bold italic serif 3"])
        with pytest.raises(UserError, match="no captions"):
            net.reading([])
        for no_captions in ("bold 3", [3]):
            with pytest.raises(UserError, match="sequence of texts"):
                net.reading(no_captions)

    def test_a_model_reads_captions_and_keeps_what_it_is(self):
        model = ScoreModel(network(), VPSDE(), data_std=0.4)
        model.learned_without_class = True
        read, t = model.eval().reading(["italic bold"]), torch.tensor(0.4)
        assert (read.num_classes, read.data_std, read.learned_without_class, read.training) == (1, 0.4, True, False)
        torch.testing.assert_close(read.condition(None)(X, t), model.condition(None)(X, t))
        with pytest.raises(UserError, match="classes 0 to 0"):
            read.condition(1)
        with pytest.raises(UserError, match="MLP, which reads none"):
            ScoreModel(MLP(2, num_classes=2), VPSDE()).reading(["bold"])

    def test_guidance_of_captions_has_its_ends(self):
        model, t = ScoreModel(network(), VPSDE()), torch.tensor(0.4)
        given, none = model.condition(EACH)(X, t), model.condition(None)(X, t)
        torch.testing.assert_close(classifier_free(model, EACH, 0)(X, t), none, rtol=0, atol=0)
        torch.testing.assert_close(classifier_free(model, EACH, 1)(X, t), given, rtol=0, atol=0)
        torch.testing.assert_close(classifier_free(model, EACH, 3)(X, t), none + 3 * (given - none))
        empty = classifier_free(model.reading([""]), 0, 5.0)  # nothing to guide to, at any scale
        torch.testing.assert_close(empty(X, t), none)

    def test_refuses(self):
        with pytest.raises(UserError, match="class_names"):
            CaptionedUNet(class_names=())
        for no_captions in ("bold sans 3", (1, 2)):
            with pytest.raises(UserError, match="sequence of texts"):
                CaptionedUNet(class_names=no_captions)
        for labels in ([-1, -1, 0, 0], [0, 1, 2, 9]):
            with pytest.raises(UserError, match=r"classes 0 to 3, or 4 for the empty caption"):
                network()(X, LABEL, torch.tensor(labels))
        with pytest.raises(UserError, match="width=10, heads=4"):
            CaptionEncoder(NAMES, width=10)
        with pytest.raises(UserError, match=r"integers of shape \(4,\)"):
            network()(X, LABEL, EACH[:2])
