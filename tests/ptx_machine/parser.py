"""PTX text to kernels: parameters, registers, variables, labels and instructions.

Only the syntax is understood here; what an opcode means is decided by the handlers in
``instructions``. Anything unexpected raises ValueError or NotImplementedError.
"""

import re
from dataclasses import dataclass, field

from .values import WIDTH

_IDENTIFIER = r"[%A-Za-z_$][\w$%@]*"


@dataclass(frozen=True)
class Operand:
    """One operand. ``parts`` holds the elements of ``{...}``, ``p|q`` and ``[a, b]`` operands."""

    kind: str  # name | immediate | vector | pair | address
    text: str
    parts: tuple = ()
    base: str = ""
    offset: int = 0
    negated: bool = False


@dataclass
class Instruction:
    opcode: str
    modifiers: tuple
    operands: tuple
    text: str
    index: int
    guard: str = ""
    guard_negated: bool = False
    line: str = ""

    @property
    def name(self):
        return ".".join((self.opcode, *self.modifiers))

    @property
    def type(self):
        return self.modifiers[-1]

    def has(self, modifier):
        return modifier in self.modifiers

    def one_of(self, *choices):
        """The first modifier out of ``choices``, or None."""
        return next((modifier for modifier in self.modifiers if modifier in choices), None)


@dataclass
class Variable:
    """A .shared, .local, .global or .const variable; ``size`` is None for extern shared memory."""

    name: str
    space: str
    align: int
    size: int | None
    data: bytes = b""
    offset: int = 0


@dataclass
class Kernel:
    name: str
    target: str
    params: list = field(default_factory=list)  # (name, size, alignment)
    registers: dict = field(default_factory=dict)  # name -> width in bytes, 0 for predicates
    labels: dict = field(default_factory=dict)
    branch_targets: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)
    code: list = field(default_factory=list)
    required_threads: int | None = None
    static_shared: int = 0
    local_bytes: int = 0
    program: object = None  # the decoded form, once it has been run


def split_operands(text):
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return parts + [current.strip()] if current.strip() else parts


def parse_operand(text):
    text = text.strip()
    if text[0] == "{" and text[-1] == "}":
        return Operand("vector", text, tuple(parse_operand(part) for part in split_operands(text[1:-1])))
    if text[0] == "[":
        return _parse_address(text)
    if "|" in text:
        return Operand("pair", text, tuple(parse_operand(part) for part in text.split("|")))
    if text[0] == "!":
        return Operand("name", text[1:].strip(), negated=True)
    if re.match(r"[-+]?[\d.]", text):
        return Operand("immediate", text)
    if re.fullmatch(_IDENTIFIER + r"(\.[\w]+)?", text):
        return Operand("name", text)
    raise NotImplementedError(f"operand syntax '{text}'")


def _parse_address(text):
    first, *rest = split_operands(text[1:-1])
    parts = tuple(parse_operand(part) for part in rest)
    match = re.fullmatch(rf"({_IDENTIFIER}|\d\w*)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?", first.strip())
    if not match:
        raise NotImplementedError(f"address syntax '{text}'")
    offset = int((match.group(2) or match.group(3) or "0").replace(" ", ""), 0)
    return Operand("address", text, parts, match.group(1), offset)


def parse_module(source):
    """All ``.entry`` kernels of a PTX text, by name."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', source))
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    source = re.sub(r"//[^\n]*", "", source)
    target = re.search(r"\.target\s+(\w+)", source)
    kernels, spans = {}, []
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*(?=[({])", source):
        kernel = Kernel(entry.group(1), target.group(1) if target else "")
        start, end = _body_span(source, entry.end())
        spans.append((start, end))
        _parse_header(kernel, source[entry.end() : start])
        _BodyParser(kernel, files).parse(source[start + 1 : end])
        kernels[kernel.name] = kernel
    outside = "".join(
        source[a:b] for a, b in zip([0] + [e for _, e in spans], [s for s, _ in spans] + [None], strict=False)
    )
    module_variables = list(_parse_variables(outside))
    for kernel, (start, end) in zip(kernels.values(), spans, strict=False):
        _lay_out(kernel, module_variables + list(_parse_variables(source[start:end])))
    return kernels


def _body_span(source, position):
    """Offsets of the braces around a kernel body; parameter lists contain none."""
    start = source.index("{", position)
    depth = 0
    for brace in re.compile(r"[{}]").finditer(source, start):
        depth += 1 if brace.group(0) == "{" else -1
        if depth == 0:
            return start, brace.start()
    raise ValueError("unbalanced braces in PTX text")


def _parse_header(kernel, header):
    params = header[header.find("(") + 1 : header.rfind(")")] if "(" in header else ""
    for text in filter(str.strip, params.split(",")):
        match = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", text, re.DOTALL)
        if not match:
            raise NotImplementedError(f"kernel parameter '{text.strip()}'")
        width = WIDTH[match.group(2)]
        size = width * int(match.group(4) or 1)
        kernel.params.append((match.group(3), size, int(match.group(1) or width)))
    threads = re.search(r"\.reqntid\s+([\d,\s]+)", header)
    if threads:
        kernel.required_threads = 1
        for extent in threads.group(1).split(","):
            kernel.required_threads *= int(extent)


def _parse_variables(text):
    pattern = (
        r"(\.extern\s+)?\.(shared|local|global|const)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
        r"\.(\w+)\s+([\w$]+)((?:\[\d*\])*)\s*(?:=\s*([^;]*))?;"
    )
    for match in re.finditer(pattern, text):
        extern, space, align, type_name, name, extents, initial = match.groups()
        width, size = WIDTH[type_name], WIDTH[type_name]
        for extent in re.findall(r"\[(\d*)\]", extents):
            size *= int(extent or 0)
        data = b""
        if initial:
            numbers = [int(number, 0) for number in re.findall(r"-?\w+", initial)]
            data = b"".join((number & ((1 << 8 * width) - 1)).to_bytes(width, "little") for number in numbers)
        dynamic = bool(extern) and space == "shared"
        yield Variable(name, space, int(align or width), None if dynamic else size, data.ljust(size, b"\0"))


def _lay_out(kernel, variables):
    """Give shared and local variables their offsets; extern shared memory follows the static part."""
    used = {"shared": 0, "local": 0}
    for variable in variables:
        kernel.variables[variable.name] = variable
        if variable.space in used and variable.size is not None:
            variable.offset = -(-used[variable.space] // variable.align) * variable.align
            used[variable.space] = variable.offset + variable.size
    dynamic = [variable for variable in variables if variable.size is None]
    align = max([variable.align for variable in dynamic], default=1)
    kernel.static_shared = -(-used["shared"] // align) * align
    kernel.local_bytes = used["local"]
    for variable in dynamic:
        variable.offset = kernel.static_shared


class _BodyParser:
    """Walks one kernel body; keeps the scopes of ``{ .reg ... }`` blocks and the current .loc."""

    _SPACE = re.compile(r"\s+")
    _LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
    _DIRECTIVE = re.compile(r"\.(loc|pragma|file|section)\b[^\n;]*;?")

    def __init__(self, kernel, files):
        self.kernel, self.files = kernel, files
        self.scopes, self.renamed, self.line, self.last_label = [{}], 0, "", ""

    def parse(self, body):
        position = 0
        while position < len(body):
            if match := self._SPACE.match(body, position):
                position = match.end()
            elif body[position] in "{}":
                self.scopes.append({}) if body[position] == "{" else self.scopes.pop()
                position += 1
            elif match := self._LABEL.match(body, position):
                self.last_label = match.group(1)
                self.kernel.labels[self.last_label] = len(self.kernel.code)
                position = match.end()
            elif match := self._DIRECTIVE.match(body, position):
                self._directive(match)
                position = match.end()
            else:
                end = body.index(";", position)
                self._statement(" ".join(body[position:end].split()))
                position = end + 1

    def _directive(self, match):
        if match.group(1) != "loc":
            return
        places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", match.group(0))
        shown = [f"{self.files.get(index, index).rsplit('/', 1)[-1]}:{line}" for index, line in places]
        self.line = " inlined at ".join(shown)

    def _statement(self, text):
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif text.startswith(".branchtargets"):
            self.kernel.branch_targets[self.last_label] = split_operands(text.split(None, 1)[1])
        elif text.startswith((".shared", ".local", ".param")):
            if text.startswith(".param"):
                raise NotImplementedError(f"device function calls are not implemented: {text}")
        elif text.startswith("."):
            raise NotImplementedError(f"directive '{text}'")
        elif text:
            self._instruction(self._rename(text) if len(self.scopes) > 1 else text)

    def _declare_registers(self, text):
        type_name, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in names.split(","):
            counted = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", name)
            stem, count = (counted.group(1), int(counted.group(2))) if counted else (name.strip(), None)
            for register in [stem] if count is None else [f"{stem}{i}" for i in range(count)]:
                unique = register
                if len(self.scopes) > 1:
                    self.renamed += 1
                    unique = f"{register}@{self.renamed}"
                    self.scopes[-1][register] = unique
                self.kernel.registers[unique] = WIDTH[type_name]

    def _rename(self, text):
        """Replace names declared in an inner block (inline assembly) by their unique names."""

        def unique(match):
            name = match.group(0)
            return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

        return re.sub(r"%?[A-Za-z_$][\w$]*", unique, text)

    def _instruction(self, text):
        match = re.fullmatch(r"(?:@(!?)([^\s]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if not match:
            raise NotImplementedError(f"statement '{text}'")
        negated, guard, name, operands = match.groups()
        opcode, *modifiers = name.split(".")
        if opcode == "call":
            raise NotImplementedError(f"device function calls are not implemented: {text}")
        operands = tuple(parse_operand(operand) for operand in split_operands(operands))
        shown = re.sub(r"@\d+", "", text) if "@" in text[1:] else text
        self.kernel.code.append(
            Instruction(
                opcode, tuple(modifiers), operands, shown, len(self.kernel.code), guard or "", bool(negated), self.line
            )
        )
