"""Activations from disk are those of the live stream, to the last bit, or are refused in one line."""

import errno
import json
import shutil
import threading
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hedgelab.data.llm import TextFiles
from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.cache_writing import write_cache
from hedgelab.errors import UserError


@pytest.fixture(scope="session")
def cached(make_data, tmp_path_factory):
    """A complete cache of the tiny model, in shards of 32 contexts."""
    folder = tmp_path_factory.mktemp("activations") / "cache"
    data = make_data()
    write_cache(data, str(folder), shard=32)
    data.teardown("fit")
    return folder


@pytest.fixture
def own(cached, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(cached, tmp_path / "copy")


def shard_file(folder, number):
    return folder / "shards" / f"{number:06}.safetensors"


def equal(one, other):
    torch.testing.assert_close(one.x, other.x, rtol=0, atol=0)


def test_batches_are_those_of_the_live_stream(cached, make_data, monkeypatch):
    live, read = make_data(normalisation="unit_norm"), make_data(normalisation="unit_norm", cache=str(cached))
    expected = {("train", index): live_batch for index, live_batch in enumerate(_batches(live, "train", 200))}
    for stage in ("val", "test"):
        expected[stage, 3] = live.batch(stage, 3)
    monkeypatch.setattr(type(read.files), "causal_lm", lambda *args: pytest.fail("loaded weights"))
    epoch = len(read._split["train"]) // 20 * read.stream("train").batches_per_block
    assert 2 * epoch < 200  # several passes over the text
    for index in (0, 199, 7, epoch, 2 * epoch + 1):
        equal(read.batch("train", index), expected["train", index])
    for stage in ("val", "test"):
        equal(read.batch(stage, 3), expected[stage, 3])
    assert read.describe() == live.describe()
    assert read.source() == live.source()
    assert read.throughput()["data/tokens_per_s"] > 0
    read.teardown("fit")


def _batches(data, stage, count):
    with torch.no_grad():
        return list(data.batches(stage, 0, count))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5, "batch_size": 16, "contexts_per_block": 10},
        {"skip_first": 4, "max_norm_ratio": 1.5, "normalisation": "centred"},
        {"held_out": 0.4, "contexts_at_once": 3, "storage_dtype": "bfloat16"},
        {"max_contexts": 100},
    ],
)
def test_one_cache_serves_many_configs(cached, make_data, options):
    live, read = make_data(**options), make_data(cache=str(cached), **options)
    for stage, index in (("train", 4), ("val", 0)):
        equal(read.batch(stage, index), live.batch(stage, index))
    assert not torch.equal(live.batch("train", 0).x, make_data().batch("train", 0).x[: len(live.batch("train", 0).x)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_formats(make_data, tmp_path, dtype):
    write_cache(make_data(storage_dtype=dtype, max_contexts=50), str(tmp_path / "cache"), shard=20)
    live = make_data(storage_dtype=dtype, max_contexts=50)
    read = make_data(storage_dtype=dtype, max_contexts=50, cache=str(tmp_path / "cache"))
    equal(read.batch("train", 3), live.batch("train", 3))
    plain = make_data(max_contexts=50).batch("train", 3).x
    assert torch.equal(live.batch("train", 3).x, plain.to(getattr(torch, dtype)).float())
    assert not torch.equal(live.batch("train", 3).x, plain)
    with pytest.raises(UserError, match=rf"data\.storage_dtype: the cache in .* holds '{dtype}', .* asks for 'float32'"):
        make_data(max_contexts=50, cache=str(tmp_path / "cache")).setup("fit")


@pytest.mark.parametrize("size", [512 * 3 + 20, 12, 1024])
def test_a_checksum_sees_every_bit_and_swapped_pages(own, size):
    cache, source = ActivationCache(own), torch.Generator().manual_seed(0)
    context = bytearray(torch.randint(256, (size,), generator=source, dtype=torch.uint8).tolist())
    kept = cache._checksum(memoryview(context))
    for bit in range(8 * size):
        context[bit // 8] ^= 1 << bit % 8
        assert cache._checksum(memoryview(context)) != kept
        context[bit // 8] ^= 1 << bit % 8
    assert cache._checksum(memoryview(context[size // 2 :] + context[: size // 2])) != kept
    assert cache._checksum(memoryview(context)) == kept


def test_a_cache_of_the_format_before_is_read_and_made_longer(make_data, tmp_path, monkeypatch):
    """Its checksums were CRC-32s."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("hedgelab.data.llm.cache_files._FORMAT", 2)
    write_cache(make_data(max_contexts=50), str(folder), shard=20)
    monkeypatch.undo()
    with safe_open(shard_file(folder, 0), "pt") as file:
        first, sums = file.get_tensor("activations")[0], file.get_tensor("checksums")
    assert sums[0] == zlib.crc32(first.numpy().tobytes())
    equal(make_data(max_contexts=50, cache=str(folder)).batch("train", 2), make_data(max_contexts=50).batch("train", 2))
    write_cache(make_data(), str(folder))
    equal(make_data(cache=str(folder)).batch("train", 2), make_data().batch("train", 2))


def test_training_resumed_in_the_middle(cached, make_data, fit, tmp_path):
    _, live = fit(make_data(), 100)
    trainer, first = fit(make_data(cache=str(cached)), 33)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_data(cache=str(cached))
    _, second = fit(resumed, 100, ckpt_path=str(tmp_path / "half.ckpt"))
    torch.testing.assert_close(torch.stack(first.seen + second.seen), torch.stack(live.seen), rtol=0, atol=0)
    assert "background" not in vars(resumed)  # nothing is left running


def test_manifest_says_whose(cached, make_data):
    manifest = json.loads((cached / "manifest.json").read_text())
    assert manifest["activations"]["hook"] == "model.layers.1"
    assert manifest["contexts"] == len(make_data().contexts.tokens)
    assert manifest["storage_dtype"] == "float32"
    assert manifest["activations"].keys() == make_data().identity().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, r"data\.hook: .* holds 'model\.layers\.1', this config asks for 'model\.layers\.0'"),
        ({"hook": "model.layers.1.mlp"}, r"data\.hook: .* asks for 'model\.layers\.1\.mlp'"),
        ({"context_length": 8}, r"data\.context_length: .* holds 16, this config asks for 8"),
        ({"attention": "eager"}, r"data\.attention: .* holds 'sdpa', this config asks for 'eager'"),
        ({"model_dtype": "bfloat16"}, r"data\.model_dtype: .* holds 'float32'"),
    ],
)
def test_other_activations_are_refused(cached, make_data, options, message):
    with pytest.raises(UserError, match=message):
        make_data(cache=str(cached), **options).setup("fit")
    with pytest.raises(UserError, match=message):  # nor is anything written over them
        write_cache(make_data(**options), str(cached))


def test_another_text_or_model_is_refused(cached, make_data, tiny_text, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"data\.text: .* this config asks for"):
        make_data(cache=str(cached), text=TextFiles(tiny_text[1:])).setup("fit")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight *= 1.01
    shutil.copytree(tiny_model, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.model: "):
        make_data(cache=str(cached), model=str(tmp_path / "other")).setup("fit")
    same = shutil.copytree(tiny_model, tmp_path / "same")  # elsewhere, but the same model
    make_data(cache=str(cached), model=str(same)).setup("fit")


def test_caches_of_release_0_1_0_are_refused(own, make_data):
    """They were zarr arrays, and told models apart by samples of their weights."""
    edited(own / "manifest.json", lambda manifest: manifest.update(format=1))
    for act in (make_data(cache=str(own)).setup, lambda _: write_cache(make_data(), str(own))):
        with pytest.raises(UserError, match=r"data\.cache: .* format 1, .*; delete it and write it anew with `hedgelab cache`"):
            act("fit")


def test_the_attention_that_transformers_chooses_is_written_down(architecture, make_data, tmp_path):
    options = {"model": architecture("Gemma2"), "max_contexts": 60}
    write_cache(make_data(**options), str(tmp_path / "cache"))
    assert ActivationCache(tmp_path / "cache").manifest["activations"]["attention"] == "eager"
    for attention in (None, "eager"):
        read = make_data(cache=str(tmp_path / "cache"), attention=attention, **options)
        equal(read.batch("train", 1), make_data(**options).batch("train", 1))


def test_names_of_a_hook_share_a_cache(cached, make_data):
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "layers.1", "model.layers.1.output"):
        data = make_data(cache=str(cached), hook=name)
        assert data.d_in == 32
        equal(data.batch("train", 1), make_data().batch("train", 1))
        assert data.source() == make_data().source()


def test_absent_cut_off_and_missing_shards_are_refused_at_once(own, make_data, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache: there is no activation cache in .*hedgelab cache"):
        make_data(cache=str(tmp_path / "nowhere")).setup("fit")
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.unlink()):
        damage(shard_file(own, 1))
        with pytest.raises(UserError, match=r"data\.cache: .* holds the first 32 of the .*hedgelab cache"):
            make_data(cache=str(own)).setup("fit")
    (own / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.cache: .* is damaged"):
        make_data(cache=str(own)).setup("fit")


def test_a_shard_lost_while_training_is_noticed(own, make_data):
    data = make_data(cache=str(own))
    data.setup("fit")
    for number in range(8):
        shard_file(own, number).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"data\.cache: .* is damaged .*No such file"):
        data.batch("val", 0)


def test_a_flipped_byte_is_found_and_mended(own, make_data):
    expected = make_data().batch("val", 0)
    for number in range(len(list((own / "shards").iterdir()))):
        damaged = bytearray(shard_file(own, number).read_bytes())
        damaged[-100] ^= 1
        shard_file(own, number).write_bytes(damaged)
    with pytest.raises(UserError, match=r"data\.cache: context \d+ in .* is damaged \(.*checksum.*--verify"):
        _batches(make_data(cache=str(own)), "train", 40)
    written = write_cache(make_data(), str(own))
    assert written.repeatable is None  # sizes alone do not tell
    assert write_cache(make_data(), str(own), verify=True).repeatable is True
    equal(make_data(cache=str(own)).batch("val", 0), expected)


def test_interrupted_writing_goes_on_and_part_can_be_used(make_data, tmp_path, monkeypatch):
    folder, write = tmp_path / "cache", ActivationCache.write

    def full(self, shard, rows):
        if shard == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, shard, rows)

    monkeypatch.setattr(ActivationCache, "write", full)
    with pytest.raises(UserError, match=r"data\.cache: the disk of .* is full; .* data\.max_contexts: 60"):
        write_cache(make_data(), str(folder), shard=20)
    monkeypatch.undo()
    contexts = len(make_data().contexts.tokens)
    with pytest.raises(UserError, match=rf"holds the first 60 of the {contexts} contexts .* data\.max_contexts: 60"):
        make_data(cache=str(folder)).setup("fit")
    equal(make_data(cache=str(folder), max_contexts=60).batch("train", 9), make_data(max_contexts=60).batch("train", 9))
    data = make_data()
    written = write_cache(data, str(folder))
    checked = 8  # contexts run twice to see that the model repeats itself
    assert (contexts - 60) * 16 <= written.tokens <= (contexts - 60 + checked) * 16
    equal(make_data(cache=str(folder)).batch("train", 9), make_data().batch("train", 9))


def test_a_cache_can_be_made_longer(make_data, tmp_path):
    folder = str(tmp_path / "cache")
    write_cache(make_data(max_contexts=50), folder, shard=20)
    with pytest.raises(UserError, match=r"holds the first 50 of the 90 contexts"):
        make_data(cache=folder, max_contexts=90).setup("fit")
    write_cache(make_data(max_contexts=90), folder)
    for contexts in (90, 50):
        live = make_data(max_contexts=contexts)
        equal(make_data(cache=folder, max_contexts=contexts).batch("train", 5), live.batch("train", 5))


def test_several_writers_share_the_work(make_data, tmp_path, monkeypatch):
    folder, write, shards = tmp_path / "cache", ActivationCache.write, []

    def recorded(self, shard, rows):
        shards.append((shard, threading.get_ident()))
        write(self, shard, rows)

    monkeypatch.setattr(ActivationCache, "write", recorded)
    monkeypatch.setattr("hedgelab.data.llm.cache_writing._POLL_SECONDS", 0.05)
    datas = [make_data(max_contexts=120) for _ in range(2)]
    for data in datas:
        _ = data.contexts, data.harvester
    threads = [threading.Thread(target=write_cache, args=(data, str(folder)), kwargs={"shard": 5}) for data in datas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shard for shard, _ in shards) == list(range(24))
    equal(make_data(cache=str(folder), max_contexts=120).batch("train", 1), make_data(max_contexts=120).batch("train", 1))


def test_a_shard_that_another_process_works_on_is_left_to_it(make_data, tmp_path):
    folder, data = tmp_path / "cache", make_data(max_contexts=40)
    cache = ActivationCache.begin(folder, data.identity(), 40, 32, "float32", shard=20)
    mine = cache.claim(0)
    assert mine is not None
    assert ActivationCache(folder).claim(0) is None
    waiting = threading.Thread(target=write_cache, args=(data, str(folder)))
    waiting.start()
    for _ in range(600):
        if cache.is_done(1):
            break
        waiting.join(0.1)
    assert cache.is_done(1)
    assert not cache.is_done(0)
    mine.release()
    waiting.join()
    assert cache.is_done(0)


def test_too_little_room_is_said_before_anything_runs(make_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hedgelab.data.llm.cache_writing.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr("hedgelab.data.llm.model.ModelFiles.causal_lm", lambda *args: pytest.fail("loaded weights"))
    with pytest.raises(UserError, match=r"data\.cache: .* needs \d+\.\d+ GB more and its disk has 0\.00 GB free"):
        write_cache(make_data(), str(tmp_path / "cache"))


def test_a_folder_of_other_things_is_left_alone(make_data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"data\.cache: .* holds other files"):
        write_cache(make_data(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


HOSTILE = {
    "contexts in words": {"contexts": "many"},
    "contexts below zero": {"contexts": -1},
    "contexts without end": {"contexts": 10**30},
    "shards of nothing": {"contexts_per_shard": 0},
    "shards of another size": {"contexts_per_shard": 31},
    "width that is true": {"d_in": True},
    "width of the universe": {"d_in": 10**12},
    "a function for a number format": {"storage_dtype": "load"},
    "another number format": {"storage_dtype": "bfloat16"},
    "no activations": {"activations": []},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_cache_is_refused_in_one_line(name, own, make_data):
    edited(own / "manifest.json", lambda manifest: manifest.update(HOSTILE[name]))
    with pytest.raises(UserError, match=r"^data\.(cache|storage_dtype): ") as error:
        make_data(cache=str(own)).batch("train", 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"", b"{}"])
def test_a_manifest_that_is_none_is_refused(content, own, make_data):
    (own / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.cache: .* is damaged"):
        make_data(cache=str(own)).batch("train", 0)


@pytest.mark.parametrize("content", [{"activations": torch.ones(32, 16, 31)}, {"other": torch.ones(2)}])
def test_a_shard_of_other_things_counts_as_not_written(content, own, make_data):
    save_file(content, shard_file(own, 0))
    with pytest.raises(UserError, match=r"^data\.cache: .* holds the first 0 of"):
        make_data(cache=str(own)).batch("train", 0)
