package agentproto

import (
	"bytes"
	"math"
	"reflect"
	"testing"
)

// TestCompact: payloads that write themselves write the library's bytes.
func TestCompact(t *testing.T) {
	for _, m := range []compact{
		Hello{}, Hello{Version: "1.2.3", BootNS: math.MaxUint64}, Hello{Modules: []string{"a", "ü", string(make([]byte, 300))}},
		Ready{}, Ready{1, 1 << 32, math.MaxUint64, "v"}, Ready{23, 24, 255, "0.1.0-dev"}, Ready{256, 65535, 65536, ""},
		Started{}, Started{math.MaxUint32}, Exited{}, Exited{255}, Exited{-1}, Exited{math.MinInt32}, Exited{math.MaxInt32},
	} {
		want, err := encMode.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.appendCBOR(nil); !bytes.Equal(got, want) {
			t.Errorf("%+v: %x, the library writes %x", m, got, want)
		}
	}
}

func usualBoots() []Boot {
	return []Boot{
		{},
		{
			Hostname: "h", Root: Root{Lower: "l", Upper: "u", Fstype: "ext4"}, Env: []string{"A=b", "", "P=\xff"},
			Mounts:  []Mount{{Kind: "tmpfs", Guest: "/t", Size: math.MaxInt64, Readonly: true, Grow: true}, {Source: "s", Fstype: "xfs", Noexec: true, Nosuid: true, Nodev: true}},
			Workdir: "/w", User: "1:2", TimeNS: 1 << 60, Entropy: make([]byte, 64),
		},
	}
}

func usualExecs() []Exec {
	dir, user, yes, no := "/", "root", true, false
	return []Exec{
		{},
		{Cmd: "/bin/true", Args: []string{"x"}, Env: []string{"A=b"}, Cwd: &dir, User: &user, TTY: true, Rows: 65535, Cols: 24, Stdin: &yes},
		{Cmd: "x", Rlimits: []Rlimit{{"nofile", 1, math.MaxUint64}}, Stdin: &no},
	}
}

// TestTakeUsual: what this package writes is read without the library.
func TestTakeUsual(t *testing.T) {
	for _, m := range usualBoots() {
		checkTaken[Boot](t, must(encMode.Marshal(m)), true)
	}
	for _, m := range usualExecs() {
		checkTaken[Exec](t, must(encMode.Marshal(m)), true)
	}
}

// checkTaken: what is taken is what the library reads.
func checkTaken[T any, P interface {
	*T
	take(*cursor)
}](t *testing.T, payload []byte, must bool) {
	t.Helper()
	var got, want T
	ok := takeAll(payload, P(&got))
	if !ok {
		if must {
			t.Errorf("%x was left to the library", payload)
		}
		return
	}
	if err := decMode.Unmarshal(payload, &want); err != nil {
		t.Fatalf("took %x, which the library refuses: %v", payload, err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("took %+v, the library reads %+v", got, want)
	}
}

// FuzzTake: a client owns these bytes. They may be taken only if the library
// takes them, and as the same message.
func FuzzTake(f *testing.F) {
	for _, m := range usualBoots() {
		f.Add(must(encMode.Marshal(m)))
	}
	for _, m := range usualExecs() {
		f.Add(must(encMode.Marshal(m)))
	}
	f.Add([]byte("\xa2\x63cmd\x61a\x63cmd\x61b"))     // a key twice
	f.Add([]byte("\xa1\x64args\x9a\xff\xff\xff\xff")) // a length beyond the payload
	f.Add([]byte("\xa1\x64rows\x1a\x00\x01\x00\x00")) // a number that does not fit
	f.Add([]byte("\xa1\x63cwd\xf6"))                  // null
	f.Add([]byte("\xa1\x67time_ns\x1b\xff" + "\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		checkTaken[Boot](t, b, false)
		checkTaken[Exec](t, b, false)
	})
}
