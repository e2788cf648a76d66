"""
Read documents from files: texts, tables and conversations.
"""

import glob
import gzip
import io
import os
import re
import zlib
from collections import Counter
from typing import NamedTuple

from data.tables import TABLES, as_dict, read_table, suffix
from data.tokenizer import EOT
from support.errors import FileError, UserError

TEXTS = '.txt .md .rst .tex .html .xml .yaml .yml .toml'.split()
CODE = '.py .c .h .cpp .js .ts .java .go .rs .sh'.split()
PIECE = 2**18  # characters of a text read at a time
MARK = re.compile(re.escape(EOT) + r'\n?')  # <|endoftext|>, with the end of its line
BREAK = re.compile(r'.* (?<=[^\W\d_] )(?=[^\W\d_])', re.DOTALL)  # to the last space between letters
ANSWERS = ('assistant', 'gpt', 'model')  # roles in conversations whose words are learned


# -----------------------------------------------------------------------------
# files
def find_files(inputs):
    """
    The files that `inputs` names, sorted for each path: a text or a list of texts, each a file,
    folder or glob, or several with commas. In folders, those with a suffix known here.
    """
    found = []
    for text in [inputs] if isinstance(inputs, str) else inputs:
        has_comma_in_name = os.path.exists(os.path.expanduser(text))
        for path in [text] if has_comma_in_name else text.split(','):
            found += find_path(os.path.expanduser(path.strip()))
    return list(dict.fromkeys(found))


def find_path(path):
    """The files of one path. Raises an error if there are none."""
    if os.path.isdir(path):
        files = find_in_folder(path)
    elif os.path.isfile(path):
        files = [path]
    elif os.path.exists(path):
        raise UserError(
            f'{path} is not a regular file, which can be read twice; write it to one first'
        )
    else:
        files = [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    if not files:
        raise FileError(f'{path}: no such file, and no text in such a folder')
    return sorted(files)


def find_in_folder(folder):
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            hidden = is_hidden(os.path.relpath(path, folder))
            if suffix(name) in [*TEXTS, *CODE, *TABLES] and not hidden:
                found.append(path)
    return found


def is_hidden(path):
    """Whether a file, or a folder that it is in, is hidden, such as .git."""
    return any(part.startswith('.') for part in path.split(os.sep))


# -----------------------------------------------------------------------------
# documents
class Part(NamedTuple):
    text: str  # a document, or a part of one
    ends: bool  # the document ends here
    at: int  # bytes of the file read so far
    counts: bool = True  # False: a prompt, which is read but not learned
    stops: bool = False  # <|endoftext|> follows although the document continues, as in a chat


class Reader:
    """
    Reads documents in Parts. A row of a table is a document; so is a text, or each of those that
    <|endoftext|> separates in it. With a prompt a document has two parts, prompt and text. A
    conversation has two for each answer.

    column: of a table, the text or conversation; prompt: the prompt, or ''
    splits: whether <|endoftext|> ends a document; else it is text
    """

    def __init__(self, column, prompt='', splits=True):
        self.column, self.prompt, self.splits = column, prompt, splits
        self.marks = Counter()  # <|endoftext|> seen: how many 'split' a text, how many are 'text'

    def read_all(self, paths):
        """The parts of all files; `at` counts from the last part."""
        for path in paths:
            before = 0
            for part in self.read(path):
                yield part._replace(at=part.at - before)
                before = part.at

    def read(self, path):
        """
        The parts of a file. Raises UserError if a text is not UTF-8, or a table lacks the column.
        """
        with open(path, 'rb') as raw:
            file = gzip.open(raw) if path.endswith('.gz') else raw
            try:
                rows = read_table(path, file, raw, self.column, self.prompt)
                if rows is None:
                    yield from self.read_text(path, file, raw)
                else:
                    for row, where, at in rows:
                        yield from self.read_row(row, where, at)
            except UnicodeDecodeError as e:
                raise UserError(f'{path} is not UTF-8 text: {e.reason}') from e
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise UserError(f'{path} is not a whole gzip file: {e}') from e

    def read_row(self, row, where, at):
        """The parts of a row of a table."""
        chat = self.column
        if chat == 'text' and 'text' not in row:
            chat = 'messages'
        if not self.prompt and isinstance(row.get(chat), list):
            return self.read_conversation(row[chat], where, at)
        if self.prompt:
            prompt = text_in(row, self.prompt, 'prompt', where)
            return self.read_answer(prompt, text_in(row, self.column, 'column', where), at)
        text = text_in(row, self.column, 'column', where)
        return [Part(document, True, at) for document in self.split(text)]

    def split(self, text):
        """The documents in a text, without blank ones."""
        found = text.count(EOT)
        self.marks['split' if self.splits else 'text'] += found
        if not found or not self.splits:
            return [text]
        return [document for document in MARK.split(text) if document.strip()]

    def read_answer(self, prompt, answer, at):
        """The two parts of a prompt and its answer. <|endoftext|> after the answer is dropped."""
        if self.splits and answer.rstrip().endswith(EOT):
            answer = answer.rstrip().removesuffix(EOT)
        self.marks['text'] += prompt.count(EOT) + answer.count(EOT)
        return [Part(prompt, False, at, counts=False), Part('\n' + answer, True, at)]

    def read_conversation(self, messages, where, at):
        """The parts of a conversation. The lines said before an answer are its prompt."""
        said, parts = [], []
        for number, message in enumerate(messages, 1):
            role, words = role_and_words(message, f'{where}: message {number}')
            if role in ANSWERS:
                parts += self.read_answer('\n'.join(said), words, at)
                said = []
            else:
                said.append(words)
        if not parts:
            roles = ' or '.join(ANSWERS)
            raise UserError(f'{where} has no answer to learn, a message whose role is {roles}')
        *before, last = parts
        return [part._replace(ends=False, stops=part.ends) for part in before] + [last]

    def read_text(self, path, file, raw):
        """The parts of a text. BPEs give the same tokens for the parts as for the whole text."""
        text = io.TextIOWrapper(file, encoding='utf-8-sig')
        rest = ''  # of what was read
        searched = 0  # characters of rest known to have no place to cut at
        continues = False  # rest continues a document
        any_mark = False  # in the text so far

        def part(piece, ends):
            self.marks['text'] += piece.count(EOT)
            return Part(piece, ends, raw.tell())

        while more := text.read(PIECE):
            if '\0' in more:
                raise UserError(f'{path} is binary, not text: it has a zero byte')
            rest += more
            if self.splits and EOT in rest:
                if rest.endswith(EOT):
                    rest += text.read(1)  # maybe the end of its line
                self.marks['split'] += rest.count(EOT)
                *documents, rest = MARK.split(rest)
                for document in documents:
                    if continues or document.strip():
                        yield part(document, True)
                    continues = False
                searched, any_mark = 0, True
            cut = find_cut(rest, searched)
            if cut:
                yield part(rest[:cut], False)
                rest, continues = rest[cut:], True
            searched = max(0, len(rest) - 2)
        if continues or rest.strip() or (rest and not any_mark):
            yield part(rest, True)


def find_cut(text, searched):
    """
    Where to cut a text, or 0 if nowhere: before the last space between two letters, where all BPEs
    in use end a token. There is none in the first `searched` characters.
    """
    found = BREAK.match(text, searched)
    if found:
        return found.end() - 1
    if len(text) > 16 * PIECE:  # a text without spaces is cut anywhere but in a mark
        return len(text) - len(EOT)
    return 0


def text_in(row, name, setting, where):
    """The text of a row in the column `name`, which is that of --column or --prompt."""
    if isinstance(row.get(name), str):
        return whole_characters(row[name])
    has = f'it has {", ".join(row) or "nothing"}'
    if name in row:
        has = f'{name!r} is {type(row[name]).__name__}'
    raise UserError(f'{where} has no text {name!r}; {has}; try --{setting}=...')


def role_and_words(message, where):
    """Who says what in a message, in the words of OpenAI or of ShareGPT."""
    message = as_dict(message)
    role = message.get('role', message.get('from'))
    words = message.get('content', message.get('value'))
    if not isinstance(role, str) or not isinstance(words, str):
        raise UserError(f'{where} needs a role and content, both text; it has {", ".join(message)}')
    return role, whole_characters(words)


def whole_characters(text):
    """A text in which half a character, which JSON can hold, is a replacement character."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
