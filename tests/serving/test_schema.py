"""Generated requests, valid and invalid, against the service's own description of itself (schemathesis)."""

import shutil

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving.service import Shop, create_app


def test_no_request_breaks_the_description(made, tmp_path):
    folder = shutil.copytree(made["inductive_ft"][1], tmp_path / "bundle")
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(Shop(str(folder)), "a-token-that-nobody-knows"))
    operations = [each.ok() for each in schema.get_all_operations()]
    assert {"/v1/recommend", "/v1/similar", "/v1/items", "/v1/model"} <= {each.path for each in operations}
    for operation in operations:

        @settings(
            max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # ids may be unknown: 400

        check()
