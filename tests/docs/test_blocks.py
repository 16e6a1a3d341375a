"""Every fenced block of the documents is tested, and every command in one: each by the test that is named here."""

import re
from dataclasses import dataclass

import pytest

from tests.docs.blocks import BLOCKS, PAGES, ROOT, Block, blocks_of

COMMANDS = "tests/docs/test_commands.py::"
OPERATE = "tests/deploy/test_operate.py::"
GATEWAY = "tests/server/test_gateway_docs.py::"
KUBERNETES = "tests/deploy/test_kubernetes.py::"
DRAWING = "a drawing"


@dataclass(frozen=True)
class Rule:
    """Which test covers what: blocks of a language on a page; of `console` blocks, the commands that match."""

    page: str
    language: str
    begins: str
    """A regular expression for the beginning of the block or command."""
    tests: tuple[str, ...]


def rule(page: str, language: str, begins: str, *tests: str) -> Rule:
    return Rule(page, language, begins, tests)


RULES = [
    # any page
    rule(".*", "console", r"make ", COMMANDS + "test_make_knows_what_it_is_told_to_make"),
    rule(".*", "console", r"pip install ", COMMANDS + "test_pip_is_told_of_extras_and_files_that_there_are"),
    rule(".*", "console", r"docker compose ", COMMANDS + "test_docker_compose_is_told_of_services_that_there_are"),
    rule(".*", "console", r"kubectl ", COMMANDS + "test_kubectl_takes_the_command"),
    rule(".*", "console", r"(\w+=\S+ )?python -m server$", COMMANDS + "test_the_gateway_starts_and_serves_the_engines"),
    rule(".*", "console", r"(\w+=\S+ )?python -m locust ", COMMANDS + "test_locust_takes_the_options"),
    rule(".*", "console", r"python bench/", COMMANDS + "test_a_script_takes_the_options"),
    # README.md
    rule("README.md", "console", r"\. \.venv/", COMMANDS + "test_the_environment_is_entered_where_it_is_made"),
    rule(
        "README.md",
        "console",
        r"VLLM_PLUGINS=aot vllm serve ",
        "tests/deploy/test_engine_flags.py::test_vllm_takes_them_and_each_switches_the_reduction_on",
        "tests/deploy/test_engine_flags.py::test_engines_that_answer_count_tokens_and_take_a_requests_retention",
    ),
    rule(
        "README.md",
        "console",
        r"VLLM_PLUGINS=aot vllm serve demo/model ",
        "tests/e2e/test_readme.py::test_the_engine_for_a_cpu_and_the_gateway_answer_as_the_readme_starts_them",
    ),
    rule("README.md", "python", "", COMMANDS + "test_the_readmes_question_is_answered_with_what_was_saved"),
    rule(
        "README.md",
        "console",
        r"(cp|install|python3 -m server\.keys|openssl|chmod) ?",
        OPERATE + "test_the_secrets_are_made_as_the_readme_makes_them",
    ),
    rule("README.md", "text", "request ── gateway", DRAWING),
    rule("SECURITY.md", "text", "clients ──TLS proxy", DRAWING),
    # docs/
    rule(
        "docs/accuracy.md",
        "console",
        r"bench/lmms_eval\.sh ",
        COMMANDS + "test_a_shell_script_is_one_and_what_it_runs_takes_the_options",
        "tests/e2e/with_gateway/test_accuracy.py::test_lmms_eval_asks_every_question_whole_and_reduced",
    ),
    rule(
        "docs/clients.md",
        "(console|python|javascript)",
        "",
        "tests/docs/test_clients.py::test_an_example_asks_about_the_video_with_the_retention",
    ),
    rule("docs/gateway.md", "console", r"(curl|printf) ", GATEWAY + "test_the_examples_with_curl_run"),
    rule("docs/gateway.md", "python", "", GATEWAY + "test_the_examples_with_the_sdk_run"),
    rule("docs/gateway.md", "yaml", "(tenants|limits|models):", GATEWAY + "test_the_example_configuration_is_one"),
    rule("docs/gateway.md", "json", r'\{"object": "video\.tokens"', COMMANDS + "test_the_answer_about_tokens_is_one"),
    rule(
        "docs/gateway.md",
        "json",
        r'\{"object": "usage"',
        GATEWAY + "test_the_example_of_usage_adds_up",
        GATEWAY + "test_the_examples_with_curl_run",
    ),
    rule("docs/gateway.md", "promql", "", COMMANDS + "test_a_query_is_one_and_asks_for_metrics_that_there_are"),
    rule(
        "docs/kubernetes.md",
        "yaml",
        "rules:",
        KUBERNETES + "test_autoscalers_know_metrics_that_there_are_and_replicas_are_left_to_them",
        COMMANDS + "test_the_adapters_queries_ask_for_metrics_that_there_are",
    ),
    rule(
        "docs/kubernetes.md",
        "console",
        r"kubectl -n aot create secret ",
        KUBERNETES + "test_the_secrets_that_the_document_creates_are_those_that_are_read",
    ),
    rule(
        "docs/kubernetes.md",
        "console",
        r"kubectl -n monitoring create configmap ",
        KUBERNETES + "test_the_dashboards_fit_into_a_config_map",
    ),
    rule(
        "docs/loadtest.md",
        "console",
        r"AOT_API_KEY=… python -m locust ",
        COMMANDS + "test_the_load_test_runs_as_documented",
    ),
    rule(
        "docs/loadtest.md",
        "console",
        r"python -m locust .*(--master --expect-workers|--worker) ",
        COMMANDS + "test_a_master_and_its_workers_run_as_documented",
    ),
    rule(
        "docs/loadtest.md",
        "console",
        r"vllm bench serve ",
        "tests/e2e/with_gateway/test_open_loop.py::test_its_requests_are_answered_reduced",
    ),
    rule("docs/media.md", "text", r"\d+ files: ", COMMANDS + "test_the_last_lines_of_a_corpus_are_those_of_the_script"),
    rule(
        "docs/media.md",
        "console",
        r"python bench/media_corpus\.py ",
        COMMANDS + "test_the_last_lines_of_a_corpus_are_those_of_the_script",
    ),
    rule(
        "docs/operate.md",
        "console",
        r"(curl|printf) ",
        OPERATE + "test_a_first_question_is_answered_with_what_was_saved",
    ),
    rule("docs/operate.md", "yaml", "models:", OPERATE + "test_a_first_question_is_answered_with_what_was_saved"),
    rule(
        "docs/operate.md",
        "console",
        r"python -m locust ",
        OPERATE + "test_retentions_are_compared_under_load",
    ),
    rule(
        "docs/operate.md",
        "console",
        r"(sed|python3 -m deploy\.kubernetes\.generate)",
        OPERATE + "test_links_to_runbooks_get_an_address_everywhere",
    ),
]


def units(block: Block) -> list[str]:
    """What a rule is for: the commands of a `console` block, any other block as a whole."""
    return block.commands if block.language == "console" else [block.text]


def covering(block: Block, unit: str) -> list[Rule]:
    return [
        rule
        for rule in RULES
        if re.fullmatch(rule.page, block.page)
        and re.fullmatch(rule.language, block.language)
        and re.match(rule.begins, unit)
    ]


def test_blocks_are_found_on_the_pages():
    assert {"README.md", "SECURITY.md", "docs/gateway.md", "demo/model/README.md"} <= {
        str(page.relative_to(ROOT)) for page in PAGES
    }
    assert len(BLOCKS) > 50
    assert sum(len(block.commands) for block in BLOCKS) > 50
    fences = sum(len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)


def test_a_block_keeps_its_place_and_loses_its_indentation(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n1. a\n\n   ```console\n   $ a \\\n       b\n   $ c\n   ```\n\n## B\n\n```\nd\n```\n")
    first, second = blocks_of(page)
    assert (first.line, first.heading, first.language, first.commands) == (5, "A", "console", ["a \\\n    b", "c"])
    assert (second.line, second.heading, second.language, second.text) == (13, "B", "", "d\n")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_and_every_command_in_it_is_covered_by_a_rule(block):
    assert units(block), "a console block without a command"
    assert [unit for unit in units(block) if not covering(block, unit)] == []
    if block.language == "console":
        assert block.text.startswith("$ "), "a command begins with a dollar sign"


def test_every_rule_covers_something():
    used = {id(rule) for block in BLOCKS for unit in units(block) for rule in covering(block, unit)}
    assert [rule for rule in RULES if id(rule) not in used] == []


@pytest.mark.parametrize("name", sorted({test for rule in RULES for test in rule.tests} - {DRAWING}))
def test_the_test_that_a_rule_names_is_there(name):
    path, _, function = name.partition("::")
    assert re.search(rf"^(async )?def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
