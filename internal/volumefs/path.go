package volumefs

import (
	"path"
	"strings"
	"unicode/utf8"
)

// clean turns a caller's path into the form used here: no leading or trailing
// slash, no empty, "." or ".." component, escapes decoded; "" is the root.
//
// ".." is taken back as text, as path.Clean and URLs do: "a/../b" is "b"
// whether or not there is an a, so nothing has to be looked up, or made, for a
// name that is not part of the result. A path that begins with more ".." than
// names is refused with errEscape.
func clean(p string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return "", errNUL
	}
	p = path.Clean(strings.TrimLeft(p, "/"))
	switch {
	case p == ".":
		return "", nil
	case p == "..", strings.HasPrefix(p, "../"):
		return "", errEscape
	}
	return unescape(p), nil
}

// split cuts a clean path before its last name; dir is "" for a name at the root.
func split(rel string) (dir, name string) {
	i := strings.LastIndexByte(rel, '/')
	if i < 0 {
		return "", rel
	}
	return rel[:i], rel[i+1:]
}

// shown is the form in which a clean path is reported: from the root, escaped.
func shown(rel string) string { return "/" + escape(rel) }

// A name that is not UTF-8 is reported with each byte that is not part of a
// valid sequence as \xHH (lower-case hex, always 80 or above). So that this can
// be undone, a backslash that would itself read as such an escape is reported
// as \x5c. Everything else stands for itself: a backslash in any other place is
// an ordinary character.

// escape returns the reported form of a name or path.
func escape(s string) string {
	if utf8.ValidString(s) && !strings.Contains(s, `\x`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		if _, ok := escapeAt(s, i); ok {
			b.WriteString(`\x5c`)
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 {
			b.WriteString(`\x`)
			b.WriteByte(hexDigits[s[i]>>4])
			b.WriteByte(hexDigits[s[i]&15])
			i++
			continue
		}
		b.WriteString(s[i : i+n])
		i += n
	}
	return b.String()
}

// unescape is the inverse of escape; text that escape never produces is left
// as it is.
func unescape(s string) string {
	i := strings.Index(s, `\x`)
	if i < 0 {
		return s
	}
	b := append(make([]byte, 0, len(s)), s[:i]...)
	for i < len(s) {
		if c, ok := escapeAt(s, i); ok {
			b = append(b, c)
			i += len(`\xHH`)
			continue
		}
		b = append(b, s[i])
		i++
	}
	return string(b)
}

const hexDigits = "0123456789abcdef"

// escapeAt decodes an escape at s[i]. No escape stands for a byte below 0x80
// but the backslash: neither a slash nor a dot nor NUL can be smuggled in.
func escapeAt(s string, i int) (byte, bool) {
	if len(s)-i < len(`\xHH`) || s[i] != '\\' || s[i+1] != 'x' {
		return 0, false
	}
	hi, lo := strings.IndexByte(hexDigits, s[i+2]), strings.IndexByte(hexDigits, s[i+3])
	if hi < 0 || lo < 0 {
		return 0, false
	}
	c := byte(hi<<4 | lo)
	return c, c >= 0x80 || c == '\\'
}
