"""The thirty goals of the service and the tests that hold each. R: reliability, S: security.

A test is `file::function`, below `tests/`. What `make faults` measures stands beside its goal in
the table at its end; for the others, the tests of `make test` say yes or no.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """text: what is promised. tests: where it is looked at."""

    text: str
    tests: tuple[str, ...]


GOALS: dict[str, Goal] = {
    "R1": Goal(
        "a selector that dies or hangs fails no answer, and is used again within 2 s",
        (
            "faults/test_selector.py::test_the_only_selector_is_killed",
            "faults/test_selector.py::test_a_selector_is_frozen",
            "faults/test_cluster.py::test_replicas_are_killed",
        ),
    ),
    "R2": Goal(
        "a proposer that dies fails no stream, and no token is lost or doubled",
        (
            "faults/test_proposers.py::test_one_of_two_proposers_is_killed",
            "faults/test_cluster.py::test_replicas_are_killed",
        ),
    ),
    "R3": Goal(
        "Redis down or frozen fails no request and adds at most 5 ms at p99",
        (
            "faults/test_redis.py::test_redis_fails_under_load",
            "labels/test_writer.py::test_a_frozen_redis_delays_nobody",
        ),
    ),
    "R4": Goal(
        "Redis killed loses no acknowledged label and doubles none",
        (
            "labels/test_ledger_kills.py::test_redis_killed_while_writers_write",
            "faults/test_redis.py::test_redis_fails_under_load",
        ),
    ),
    "R5": Goal(
        "a power cut loses no acknowledged label",
        ("labels/test_power_loss.py::test_labels_survive_twenty_power_cuts",),
    ),
    "R6": Goal(
        "a full disk or Redis stops no answer, and drops are counted exactly",
        (
            "labels/test_power_loss.py::test_a_full_spool_disk_loses_exactly_what_it_says",
            "labels/test_power_loss.py::test_a_full_lake_disk_keeps_labels_in_redis",
            "faults/test_redis.py::test_redis_fails_under_load",
        ),
    ),
    "R7": Goal(
        "a reader of labels that dies loses and doubles none; poison blocks nothing",
        (
            "labels/test_ledger_kills.py::test_the_reader_is_killed",
            "labels/test_drain.py::test_poison_becomes_a_dead_letter_and_blocks_nothing",
        ),
    ),
    "R8": Goal(
        "a version swapped under streams fails and mixes none, and is seen within 5 s",
        (
            "faults/test_swap.py::test_versions_are_swapped_under_streams",
            "faults/test_cluster.py::test_a_version_is_seen_everywhere",
            "services/serve/test_version_watcher.py::test_bad_versions_are_refused_and_the_old_one_serves",
        ),
    ),
    "R9": Goal(
        "a training worker that dies goes on, and a version is published whole or not at all",
        (
            "services/train/test_worker.py::test_killed_at_any_moment_it_ends_with_the_same_weights",
            "versions/test_registry.py::test_killed_publishers_leave_nothing_to_repair",
        ),
    ),
    "R10": Goal(
        "at 5x load goodput stays >= 90 %, and refusals come within 100 ms",
        ("faults/test_load.py::test_five_times_the_capacity",),
    ),
    "R11": Goal(
        "who cancels, leaves or is late holds nothing 250 ms later",
        (
            "faults/test_ends.py::test_answers_that_end_early_hold_nothing",
            "services/http/test_access.py::test_a_client_that_leaves_ends_its_answer",
        ),
    ),
    "R12": Goal(
        "a network that is slow, silent or wrong hangs nothing and falsifies nothing",
        (
            "faults/test_network.py::test_the_way_to_the_only_selector",
            "faults/test_network.py::test_the_way_to_redis",
            "faults/test_network.py::test_bytes_are_changed_on_the_way_to_the_only_selector",
        ),
    ),
    "R13": Goal(
        "SIGTERM under load and a rolling restart of every role fail no stream",
        (
            "faults/test_proposers.py::test_one_of_two_gateways_is_terminated",
            "faults/test_proposers.py::test_every_part_is_restarted_in_its_turn",
            "services/serve/test_draining.py::test_a_gateway_says_so_before_it_stops",
        ),
    ),
    "R14": Goal(
        "Serve's controller or Ray's GCS killed fails no answer; a gateway killed is back",
        (
            "faults/test_cluster.py::test_what_is_not_ours_is_killed",
            "faults/test_cluster.py::test_the_state_of_ray_dies",
        ),
    ),
    "R15": Goal(
        "programs of the last release and this one understand each other",
        (
            "test_contracts.py::test_protos_break_no_client_of_the_last_release",
            "services/rpc/test_golden_messages.py::test_this_program_understands_an_old_message",
        ),
    ),
    "R16": Goal(
        "over half an hour with faults memory grows <= 1 MB/min, descriptors and tasks not",
        ("faults/test_soak.py::test_nothing_grows",),
    ),
    "R17": Goal(
        "a cached selection is the fresh one, and never another query's",
        (
            "decode/test_selection_cache.py::test_a_hit_equals_the_fresh_reply_and_asks_nobody",
            "decode/test_selection_cache.py::test_every_ingredient_of_a_query_changes_its_key",
            "decode/test_selection_cache.py::test_another_llm_or_tokenizer_changes_the_key",
        ),
    ),
    "S1": Goal(
        "beyond loopback nothing starts without TLS and a token",
        ("test_config.py::test_exposed_servers_need_tls_and_a_token",),
    ),
    "S2": Goal(
        "every method and route needs a token with its role; unknown ones are nobody's",
        (
            "services/rpc/test_authorization.py::test_every_method_of_every_server_needs_its_role",
            "services/rpc/test_authorization.py::test_what_has_no_rule_is_nobodys",
            "services/http/test_access.py::test_without_the_token_only_health_and_the_empty_page",
        ),
    ),
    "S3": Goal(
        "only the right certificates connect; new ones are taken up without a restart",
        (
            "services/rpc/test_tls.py::test_mutual_tls_hears_only_clients_with_a_certificate",
            "services/rpc/test_tls.py::test_new_certificates_are_taken_up_while_calls_go_on",
            "services/http/test_connections.py::test_new_certificates_are_taken_up",
        ),
    ),
    "S4": Goal(
        "limits are enforced before work, and a large request stops no other stream",
        (
            "faults/test_bodies.py::test_streams_go_on_beside_large_requests",
            "services/serve/test_request_limits.py::test_every_text_of_a_request_has_a_limit",
            "services/http/test_wrong_bodies.py::test_bodies_of_very_many_values_are_not_parsed",
        ),
    ),
    "S5": Goal(
        "10,000 malformed requests: documented statuses, no crash, streams go on beside",
        (
            "fuzz/test_servers.py::test_ten_thousand_malformed_requests",
            "fuzz/test_servers.py::test_a_few_hundred_malformed_requests",
        ),
    ),
    "S6": Goal(
        "nothing that is received is unpickled or run",
        (
            "test_pickle_bombs.py::test_a_bomb_in_the_stream_is_a_dead_letter",
            "test_pickle_bombs.py::test_a_bomb_in_an_adapter_folder_is_refused",
            "test_pickle_bombs.py::test_the_script_of_a_data_set_is_not_run",
        ),
    ),
    "S7": Goal(
        "errors tell nothing of our insides",
        (
            "fuzz/test_servers.py::test_ten_thousand_malformed_requests",
            "services/http/test_errors.py::test_each_failure_has_its_status",
        ),
    ),
    "S8": Goal(
        "no prompt reaches a log, a metric or another user of the machine",
        (
            "services/serve/test_prompt_privacy.py::test_no_prompt_reaches_a_log",
            "test_files.py::test_what_quotes_users_is_made_for_its_owner_alone",
        ),
    ),
    "S9": Goal(
        "Ray takes no job without its token; pods are locked down",
        (
            "faults/test_cluster.py::test_ray_takes_no_job_without_its_token",
            "cluster/test_launchers.py::test_ray_starts_with_its_token_and_an_inward_dashboard",
            "cluster/test_kubernetes.py::test_k14_pods_are_locked_down",
            "cluster/test_kubernetes.py::test_k14_network_policies_name_who_may_come",
        ),
    ),
    "S10": Goal(
        "each role may do in Redis what it needs and nothing else",
        (
            "services/launch/test_redis_acl.py::test_no_role_may_do_what_the_product_does_not",
            "cluster/test_kubernetes.py::test_each_process_finds_the_password_of_its_role",
        ),
    ),
    "S11": Goal(
        "what is installed is pinned, and the wheel brings code alone",
        (
            "test_supply_chain.py::test_every_package_is_pinned",
            "test_supply_chain.py::test_the_wheel_brings_no_secrets_and_no_tests",
        ),
    ),
    "S12": Goal(
        "idle and slow clients slow others by at most half, and have a quota",
        (
            "faults/test_load.py::test_idle_and_slow_reading_clients",
            "services/serve/test_client_quota.py::test_a_token_that_nobody_checks_is_no_client_of_its_own",
            "services/http/test_connections.py::test_open_connections_are_bounded",
        ),
    ),
    "S13": Goal(
        "labels of unknown models are dead letters, and the gate judges what is trained",
        (
            "labels/test_drain.py::test_labels_of_unknown_models_are_dead_letters_that_can_be_sent_again",
            "versions/test_gate.py::test_agreement_alone_does_not_open_it_where_answers_are_known",
        ),
    ),
}
