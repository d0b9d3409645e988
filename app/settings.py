"""Every setting, read once from the environment (prefix STUDIO_)."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The defaults suit one laptop; README and docs/settings.md describe each one."""

    model_config = SettingsConfigDict(env_prefix="STUDIO_", extra="ignore")

    home: str = Field("data", description="Folder that holds everything the studio keeps.")
    host: str = Field("127.0.0.1", description="Address the web listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the web listens on.")
    token: str = Field(
        "", description="Access token; empty: made once and kept in the home folder."
    )
    allowed_hosts: str = Field(
        "", description="More host names (comma separated) that requests may be addressed to."
    )
    database_url: str = Field("", description="PostgreSQL URL; empty: SQLite in the home folder.")
    redis_url: str = Field("", description="Redis URL; empty: the embedded Valkey.")
    files_url: str = Field(
        "", description="File store of several machines (s3://..., file:///...); empty: none."
    )
    hub_url: str = Field(
        "https://huggingface.co", description="Model hub to fetch base models from."
    )
    max_upload_mb: int = Field(200, ge=1, description="Largest dataset file, in MB.")
    min_examples: int = Field(50, ge=1, description="Fewest examples of a dataset.")
    max_examples: int = Field(10_000, ge=1, description="Most examples of a dataset.")
    lease_seconds: float = Field(
        30.0, gt=0, description="How long a worker's claim on a run holds."
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="Time between two checkpoints.")
    checkpoint_share: float = Field(
        0.03, gt=0, le=1, description="Most of the time that may go into checkpoints."
    )
    disk_reserve_mb: int = Field(200, ge=0, description="Disk space that runs leave free, in MB.")
    crash: str = Field("", description="For tests: where a process of the studio shall die.")
    threads: int = Field(0, ge=0, description="CPU threads for tuning; 0: all cores.")


settings = Settings()
