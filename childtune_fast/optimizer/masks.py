"""MaskBook: which mask each parameter of an optimizer has, however the parameter came into its groups."""

import itertools
from typing import Any, NamedTuple

from torch import Tensor

from ..arguments import is_sharded
from ..child import ChildNetwork
from ..ops.packed_mask import Masks, PackedMask, fingerprint
from ..ops.step_group import check_mask


class _Entry(NamedTuple):
    """What is known of a parameter.

    Attributes:
        mask: its mask; None if it is trained in full.
        name: its name in the child network, or in its group if the mask is a checkpoint's; None if it has none.
    """

    mask: PackedMask | None
    name: str | None


class MaskBook:
    """The one record of which parameters of an optimizer are masked.

    A parameter that is new in the groups is recognised by identity, for the child network knows where in its model each
    masked parameter is; else by its name; else by its place, if it stands where one of its shape stood that has left
    the groups. Any other is trained in full, unless it may be a masked one in another form: then reading raises.

    Attributes:
        child: the ChildNetwork that the optimizer was given; None if the masks are a checkpoint's, or there are none.
        active: whether the optimizer has a child network, its own or a checkpoint's.
        masks: {parameter: its mask, on its device} of the masked parameters that the groups held when last read.
        fingerprint: that of `masks`; None before the first reading.
    """

    def __init__(self, child: ChildNetwork | None = None) -> None:
        self.child = child
        self.active = child is not None
        self.masks: Masks = {}
        self.fingerprint: str | None = None
        self._entries: dict[Tensor, _Entry] = {}  # of the parameters in the groups, and of masked ones that have left
        self._params: list[Tensor] = []  # the parameters in the groups when they were last read
        self._ids: list[int] = []  # theirs, which tell quickly whether the groups have changed

    def adopt(self, masks: Masks, param_groups: list[dict[str, Any]]) -> None:
        """Takes a checkpoint's masks instead of all others; the groups' other parameters are trained in full."""
        self.active, self._entries = True, {}
        self._keep({param: _Entry(masks.get(param), name) for param, name in _names(param_groups).items()})

    def become(self, other: "MaskBook") -> None:
        """Takes all from another book, in place, since a wrapper of the optimizer may hold this object."""
        self.__dict__.update(other.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": []}  # other objects have them by then

    def read(self, param_groups: list[dict[str, Any]], *, anew: bool = False) -> Masks:
        """Returns `masks`, after looking up what is new in the groups.

        Args:
            param_groups: the optimizer's parameter groups.
            anew: moves masks to their parameters' devices, too, though the parameters are those of the last reading.

        Raises:
            ValueError: a new parameter has another shape than its mask, or may be a masked one in another form. The
                book is as before then.
        """
        ids = list(map(id, itertools.chain.from_iterable(group["params"] for group in param_groups)))
        if anew or ids != self._ids:
            self._keep(self._looked_up(_names(param_groups)))
            self._ids = ids
        return self.masks

    def _keep(self, entries: dict[Tensor, _Entry]) -> None:
        """Makes these the entries of the parameters in the groups; forgets those that have left and are not masked."""
        left = _unclaimed(self._entries, entries)
        entries = {param: _fitting(param, entry) for param, entry in entries.items()}
        self._entries = {**{param: entry for param, entry in left.items() if entry.mask is not None}, **entries}
        self._params = list(entries)
        self.masks = {param: entry.mask for param, entry in entries.items() if entry.mask is not None}
        self.fingerprint = fingerprint(self.masks.values())

    # ---- How a parameter is recognised -----------------------------------------------------------------------------

    def _looked_up(self, names: dict[Tensor, str | None]) -> dict[Tensor, _Entry]:
        """Returns the entry of each parameter in the groups, given the name that it has there."""
        entries = {param: self._entries[param] for param in names if param in self._entries}
        self._by_identity(entries, names)  # also one that trained in full, if it has been tied to a masked one
        self._by_name(entries, names)
        if not self._lost(entries):
            self._by_model(entries, names)
        self._by_place(entries, names)
        strangers = [param for param in names if param not in entries]
        if strangers:
            self._check_strangers(strangers, entries, names)
        return {param: entries.get(param, _Entry(None, name)) for param, name in names.items()}

    def _by_identity(self, entries: dict[Tensor, _Entry], names: dict[Tensor, str | None]) -> None:
        if self.child is not None:
            for param, name in self.child.places.names().items():
                if param in names and (param not in entries or entries[param].mask is None):
                    entries[param] = _Entry(self.child.packed[name], name)

    def _by_name(self, entries: dict[Tensor, _Entry], names: dict[Tensor, str | None]) -> None:
        left = {entry.name: entry for entry in _unclaimed(self._entries, entries).values()}
        taken = {entry.name for entry in entries.values()}
        given = [name for name in names.values() if name is not None]
        here = {} if self.child is None else self.child.names_for(given)
        for param, name in names.items():
            known = here.get(name or "", name)
            if param in entries or known is None or known in taken:
                continue
            if self.child is not None and known in self.child.packed:
                entries[param] = _Entry(self.child.packed[known], known)
            elif known in left:
                entries[param] = left[known]

    def _by_model(self, entries: dict[Tensor, _Entry], names: dict[Tensor, str | None]) -> None:
        """Recognises the other parameters of the model, of which the masked ones are all where they were."""
        for param in () if self.child is None else self.child.places.parameters():
            if param in names and param not in entries:
                entries[param] = _Entry(None, names[param])

    def _by_place(self, entries: dict[Tensor, _Entry], names: dict[Tensor, str | None]) -> None:
        left = _unclaimed(self._entries, entries)
        for param, former in zip(names, self._params):  # noqa: B905 - whichever is shorter
            if param not in entries and former in left and former.shape == param.shape:
                entries[param] = left[former]

    def _lost(self, entries: dict[Tensor, _Entry]) -> list[str]:
        """Returns the names of masked parameters that the model no longer has, and nobody has taken."""
        taken = {entry.name for entry in entries.values()}
        current = {} if self.child is None else self.child.places.current()
        return [name for name, params in current.items() if not params and name not in taken]

    def _check_strangers(
        self, strangers: list[Tensor], entries: dict[Tensor, _Entry], names: dict[Tensor, str | None]
    ) -> None:
        """Raises ValueError if a parameter that nobody knows may be one that the child network masks."""
        lost = [f"'{name}'" for name in self._lost(entries)]
        left = _unclaimed(self._entries, entries)
        lost += [f"one of shape {tuple(param.shape)}" for param, entry in left.items() if entry.mask is not None]
        if lost and any(entry.mask is not None for entry in (*entries.values(), *left.values())):
            raise ValueError(
                "ChildAdamW: the parameters that the child network masks must be found in the model or in the "
                f"optimizer's groups, for an unknown one may be one of them in another form (got {len(lost)} that are "
                f"gone, the first is {lost[0]}, and {len(strangers)} unknown, the first of shape "
                f"{tuple(strangers[0].shape)}); make child network and optimizer after parameters are sharded, "
                "flattened, parametrised or replaced, and freeze a masked one rather than remove it from its group"
            )
        if self.child is not None:
            self.child.check_known((names[param] for param in strangers), [entry.name for entry in entries.values()])


def _names(param_groups: list[dict[str, Any]]) -> dict[Tensor, str | None]:
    """Returns {parameter: its name in its group, or None} in the order of the groups."""
    named: dict[Tensor, str | None] = {}
    for group in param_groups:
        names = itertools.chain(group.get("param_names", ()), itertools.repeat(None))  # a user may have added params
        named.update(zip(group["params"], names))  # noqa: B905 - `names` is endless
    return named


def _unclaimed(known: dict[Tensor, _Entry], entries: dict[Tensor, _Entry]) -> dict[Tensor, _Entry]:
    """Returns those of `known` whose parameter is not in `entries`, and neither is their mask under another one."""
    claimed = {id(entry) for entry in entries.values()}
    names = {entry.name for entry in entries.values() if entry.mask is not None and entry.name is not None}
    return {
        param: entry
        for param, entry in known.items()
        if param not in entries and id(entry) not in claimed and entry.name not in names
    }


def _fitting(param: Tensor, entry: _Entry) -> _Entry:
    """Returns the entry with its mask on the parameter's device; raises ValueError if the mask cannot serve it."""
    if entry.mask is None:
        return entry
    check_mask(entry.mask, param)
    return entry._replace(mask=of_rank(entry.mask, param))


def of_rank(mask: PackedMask, param: Tensor) -> PackedMask:
    """Returns the mask, on the parameter's device, of what this rank holds of the parameter.

    Raises:
        ValueError: the parameter is sharded otherwise than when the mask was cut.
    """
    if is_sharded(param):
        from ..ops.shards import LocalMask

        return LocalMask.of(mask, param)
    return mask.to(param.device)
