package volumefs

import (
	"errors"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestClean(t *testing.T) {
	tests := map[string]struct {
		want string
		err  error
	}{
		"":                 {"", nil},
		"/":                {"", nil},
		"///":              {"", nil},
		".":                {"", nil},
		"a/..":             {"", nil},
		"a":                {"a", nil},
		"/a":               {"a", nil},
		"//a":              {"a", nil},
		"a/":               {"a", nil},
		"a//b/./c":         {"a/b/c", nil},
		"a/../b":           {"b", nil},
		"..":               {"", errdefs.ErrPathEscape},
		"/..":              {"", errdefs.ErrPathEscape},
		"//../x":           {"", errdefs.ErrPathEscape},
		"a/../../x":        {"", errdefs.ErrPathEscape},
		"a/b/../../../vol": {"", errdefs.ErrPathEscape},
		"..a":              {"..a", nil},
		"a/..b":            {"a/..b", nil},
		"...":              {"...", nil},
		"a\x00b":           {"", unix.EINVAL},
		`a\b`:              {`a\b`, nil},
		`a\xffb`:           {"a\xffb", nil},
		`a\x2f..\x2fb`:     {`a\x2f..\x2fb`, nil},
		`\x2e\x2e/a`:       {`\x2e\x2e/a`, nil},
		`a\x5cxff`:         {`a\xff`, nil},
		`\xFF`:             {`\xFF`, nil},
	}
	for in, tt := range tests {
		got, err := clean(in)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("clean(%q) = %q, %v; want %q, %v", in, got, err, tt.want, tt.err)
		}
	}
}

func TestEscape(t *testing.T) {
	tests := map[string]string{
		"plain":             "plain",
		"é":                 "é",
		"\ufffd":            "\ufffd",
		"bad\xff\xfe":       `bad\xff\xfe`,
		`back\slash`:        `back\slash`,
		`looks\xff`:         `looks\x5cxff`,
		`looks\x41`:         `looks\x41`,
		`\x5c`:              `\x5cx5c`,
		"\xc3":              `\xc3`,
		"\xed\xa0\x80":      `\xed\xa0\x80`,
		"\\\xff":            `\\xff`,
		"a/\xff/b":          `a/\xff/b`,
		`\x` + "\x80" + `0`: `\x\x800`,
	}
	for raw, want := range tests {
		if got := escape(raw); got != want {
			t.Errorf("escape(%q) = %q, want %q", raw, got, want)
		}
		if got := unescape(want); got != raw {
			t.Errorf("unescape(%q) = %q, want %q", want, got, raw)
		}
	}
}

// FuzzEscape: a guest chooses names. Whatever it chose, what is listed is
// UTF-8 and leads back to the same name.
func FuzzEscape(f *testing.F) {
	for _, s := range []string{"a", "\xff", `\xff`, `\x5c`, "\\x\xff", `\x5c\x5cxff`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		e := escape(raw)
		if !utf8.ValidString(e) || unescape(e) != raw {
			t.Fatalf("%q -> %q -> %q", raw, e, unescape(e))
		}
	})
}

// FuzzClean: a caller chooses paths. What comes out has no component that
// means anything to the kernel but a name, and is a fixed point once escaped.
func FuzzClean(f *testing.F) {
	for _, s := range []string{"", "/", "..", "a/../b", "//x/./..//y", `\xff/\x5c`, "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p string) {
		rel, err := clean(p)
		if err != nil {
			return
		}
		for dir, name := split(rel); rel != ""; dir, name = split(dir) {
			if name == "" || name == "." || name == ".." {
				t.Fatalf("clean(%q) = %q", p, rel)
			}
			if dir == "" {
				break
			}
		}
		if again, err := clean(shown(rel)); err != nil || again != rel {
			t.Fatalf("clean(%q) = %q, shown %q, clean of that %q, %v", p, rel, shown(rel), again, err)
		}
	})
}
