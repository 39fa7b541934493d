"""An export to the Hugging Face hub, for those who ask.

repository = Repository("somebody/model", is_private=True)
repository.check(run)       # before the work: a login, and nothing there but this run's exports
repository.push(out)        # one commit
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # HTTPError is that of the client it uses, base of its own
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from phi3v.errors import ConfigError
from phi3v.export.target import ORIGIN, is_same_run, read_origin

LONG = 300  # characters of a message of the hub that are shown


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub, `owner/name`."""

    name: str
    is_private: bool

    def check(self, run: Path) -> None:
        """Refuse early what the hub would refuse late, and a repository that holds something else.

        Raises: ConfigError
        """
        self._check_name()
        api = HfApi()
        with self._told():
            api.whoami()
            try:
                files = api.list_repo_files(self.name)
            except RepositoryNotFoundError:
                return
            files = [file for file in files if file != ".gitattributes"]
            found = {}
            if ORIGIN in files:
                path = api.hf_hub_download(self.name, ORIGIN)
                found = read_origin(Path(path).read_text(encoding="utf-8"))
        if files and not is_same_run(found, run):
            source = f"an export of another run, {found['run']}" if found else "other files"
            raise ConfigError(
                f"--push {self.name} holds {source}, {files[0]} among them; name another repository"
            )

    def push(self, out: Path) -> str:
        """Upload a folder in one commit, replacing what was pushed before; returns its address.

        Raises: ConfigError
        """
        api = HfApi()
        with self._told():
            api.create_repo(self.name, private=self.is_private or None, exist_ok=True)
            commit = api.upload_folder(
                repo_id=self.name,
                folder_path=out,
                commit_message=f"Export of {out.name}",
                delete_patterns="*",
            )
        return str(commit.repo_url)

    def _check_name(self) -> None:
        """Refuse a name that the hub would not take, before anybody has to log in for it."""
        try:
            validate_repo_id(self.name)
            is_valid = "/" in self.name
        except HFValidationError:
            is_valid = False
        if not is_valid:
            raise ConfigError(
                f"--push must be OWNER/NAME, got {self.name!r}; the hub takes letters, digits, "
                "'-', '_' and '.', no '--' or '..', no '-' or '.' at either end, and no .git there"
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell a failure of the hub in one sentence."""
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise ConfigError(
                f"--push {self.name} needs a login at the hub; run `hf auth login`, or set HF_TOKEN"
            ) from error
        except OfflineModeIsEnabled as error:
            raise ConfigError(
                f"--push {self.name} needs the hub, and HF_HUB_OFFLINE is set; unset it, or leave "
                "--push out"
            ) from error
        except (HTTPError, HFValidationError) as error:
            reason = " ".join(str(error).split())[:LONG] or type(error).__name__
            raise ConfigError(
                f"--push {self.name} failed: {reason}; check the name, the login's rights and the "
                "network, then push again"
            ) from error
