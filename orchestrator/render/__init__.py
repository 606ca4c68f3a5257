"""What is sent to a target, as plain objects. Pure: what ``plan --manifests`` prints is what ``submit`` sends."""

from orchestrator.render.attempt import AttemptRequest as AttemptRequest
from orchestrator.render.attempt import submission_id as submission_id
from orchestrator.render.job import JobRequest as JobRequest
from orchestrator.render.job import job_request as job_request
from orchestrator.render.job import package_uri as package_uri
from orchestrator.render.preparation import PrepareRequest as PrepareRequest
from orchestrator.render.preparation import preparation_id as preparation_id
from orchestrator.render.ray_job import RayJobRequest as RayJobRequest
from orchestrator.render.ray_job import ray_job as ray_job
from orchestrator.render.ray_service import RayServiceRequest as RayServiceRequest
from orchestrator.render.ray_service import ray_service as ray_service
from orchestrator.render.ray_service import serve_application as serve_application
from orchestrator.render.ray_service import service_name as service_name
from orchestrator.render.requested_job import RequestedJob as RequestedJob
