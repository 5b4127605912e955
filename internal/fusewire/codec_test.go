package fusewire

import (
	"bytes"
	"strings"
	"syscall"
	"testing"
)

func TestTakeName(t *testing.T) {
	long := strings.Repeat("a", NameMax)
	tests := map[string]struct {
		in     string
		want   string
		rest   string
		err    syscall.Errno
		lookup syscall.Errno // of TakeLookupName
	}{
		"plain":           {"a\x00b\x00", "a", "b\x00", 0, 0},
		"not UTF-8":       {"\xff\xfe\x00", "\xff\xfe", "", 0, 0},
		"three dots":      {"...\x00", "...", "", 0, 0},
		"hidden":          {".a\x00", ".a", "", 0, 0},
		"255 bytes":       {long + "\x00", long, "", 0, 0},
		"256 bytes":       {long + "a\x00", "", "", syscall.ENAMETOOLONG, syscall.ENAMETOOLONG},
		"no bytes":        {"", "", "", syscall.EINVAL, syscall.EINVAL},
		"empty":           {"\x00", "", "", syscall.EINVAL, syscall.EINVAL},
		"no NUL":          {"abc", "", "", syscall.EINVAL, syscall.EINVAL},
		"slash":           {"a/b\x00", "", "", syscall.EINVAL, syscall.EINVAL},
		"only slash":      {"/\x00", "", "", syscall.EINVAL, syscall.EINVAL},
		"trailing slash":  {"a/\x00", "", "", syscall.EINVAL, syscall.EINVAL},
		"dot":             {".\x00", "", "", syscall.EINVAL, 0},
		"dot dot":         {"..\x00", "", "", syscall.EINVAL, 0},
		"dot dot slash":   {"../x\x00", "", "", syscall.EINVAL, syscall.EINVAL},
		"slash after NUL": {"a\x00/\x00", "a", "/\x00", 0, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n, rest, err := TakeName([]byte(tt.in))
			if err != tt.err {
				t.Fatalf("TakeName(%q): %v, want %v", tt.in, err, tt.err)
			}
			if _, _, err := TakeLookupName([]byte(tt.in)); err != tt.lookup {
				t.Errorf("TakeLookupName(%q): %v, want %v", tt.in, err, tt.lookup)
			}
			if err == 0 && (n.String() != tt.want || string(rest) != tt.rest || n.b[len(n.b)-1] != 0) {
				t.Errorf("TakeName(%q) = %q, %q", tt.in, n, rest)
			}
		})
	}
}

func TestTakeString(t *testing.T) {
	for name, tt := range map[string]struct {
		in  string
		max int
		err syscall.Errno
	}{
		"at the limit": {"abc\x00", 3, 0},
		"above it":     {"abcd\x00", 3, syscall.ENAMETOOLONG},
		"no NUL":       {"abc", 3, syscall.EINVAL},
		"empty":        {"\x00", 3, syscall.ENOENT},
	} {
		if _, _, err := TakeString([]byte(tt.in), tt.max); err != tt.err {
			t.Errorf("%s: %v, want %v", name, err, tt.err)
		}
	}
}

func TestDecodeShort(t *testing.T) {
	var h InHeader
	if _, ok := Decode(make([]byte, InHeaderSize-1), &h); ok {
		t.Error("a short header was accepted")
	}
	in := InHeader{Len: 44, Opcode: OpGetattr, Unique: 7, NodeID: 1, UID: 2, GID: 3, PID: 4, TotalExtlen: 5}
	b := append(Append(nil, &in), "rest"...)
	rest, ok := Decode(b, &h)
	if !ok || h != in || string(rest) != "rest" {
		t.Errorf("Decode = %+v, %q, %v", h, rest, ok)
	}
}

func TestPutDirent(t *testing.T) {
	b := bytes.Repeat([]byte{0xee}, 64)
	n := PutDirent(b, &Dirent{Ino: 1, Off: 2, Type: 8}, []byte("abc"))
	if n != 32 || string(b[DirentSize:32]) != "abc\x00\x00\x00\x00\x00" || b[32] != 0xee {
		t.Errorf("n = %d, % x", n, b[:40])
	}
	if n := PutDirent(b[:31], &Dirent{}, []byte("abc")); n != 0 {
		t.Errorf("an entry of 32 bytes fitted into 31")
	}
}

// FuzzTakeName: the guest owns these bytes. Whatever is accepted is one
// component that cannot leave its directory.
func FuzzTakeName(f *testing.F) {
	for _, s := range []string{"a\x00", "..\x00", "a/b\x00", "", "\x00", strings.Repeat("x", 300) + "\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, rest, err := TakeName(b)
		if err != 0 {
			return
		}
		s := n.String()
		if s == "" || s == "." || s == ".." || len(s) > NameMax || strings.ContainsAny(s, "/\x00") {
			t.Fatalf("accepted %q", s)
		}
		if !bytes.Equal(append([]byte(s+"\x00"), rest...), b) {
			t.Fatalf("%q + %q != %q", s, rest, b)
		}
	})
}

// FuzzDecodeHeader: a header that decodes survives the round trip.
func FuzzDecodeHeader(f *testing.F) {
	f.Add(make([]byte, InHeaderSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h InHeader
		if _, ok := Decode(b, &h); ok != (len(b) >= InHeaderSize) {
			t.Fatalf("ok = %v for %d bytes", ok, len(b))
		} else if ok && !bytes.Equal(Append(nil, &h)[:36], b[:36]) {
			t.Fatal("round trip")
		}
	})
}
