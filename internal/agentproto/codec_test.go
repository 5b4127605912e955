package agentproto

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
)

// TestEncodeMatchesPeer compares with the bytes the peer's client sends.
func TestEncodeMatchesPeer(t *testing.T) {
	body, err := Encode(MsgSignal, Signal{Signal: 9})
	if err != nil {
		t.Fatal(err)
	}
	want := "a3617607617470" + hex.EncodeToString([]byte("core.exec.signal")) + "617049a1667369676e616c09"
	if got := hex.EncodeToString(body); got != want {
		t.Errorf("Encode = %s, want %s", got, want)
	}
}

func TestEncodeDataEqualsLibrary(t *testing.T) {
	for _, n := range []int{0, 1, 23, 24, 255, 256, 65535, 65536, MaxData} {
		data := bytes.Repeat([]byte{7}, n)
		body := EncodeData(MsgStdout, data)
		var e envelope
		if err := cbor.Unmarshal(body, &e); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		var d Data
		if err := cbor.Unmarshal(e.P, &d); err != nil || !bytes.Equal(d.Data, data) || e.T != MsgStdout || e.V != Generation {
			t.Errorf("%d bytes: %q v%d, %d bytes back, %v", n, e.T, e.V, len(d.Data), err)
		}
		if over := len(body) - n; over > DataOverhead {
			t.Errorf("%d bytes: overhead %d", n, over)
		}
		_, _, p, err := Decode(body)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeData(p); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: DecodeData: %d bytes, %v", n, len(got), err)
		}
	}
	if n := len(EncodeData(MsgFSData, make([]byte, MaxData))) + bodyOverhead; n > MaxLinkFrame {
		t.Errorf("a full data frame is %d bytes, beyond MaxLinkFrame", n)
	}
}

func TestReaderBounds(t *testing.T) {
	frame := AppendFrame(nil, Frame{ID: 5, Flags: FlagTerminal, Body: []byte("hello")})
	length := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	tests := map[string]struct {
		in   []byte
		want error
	}{
		"whole":            {frame, nil},
		"nothing":          {nil, io.EOF},
		"cut in length":    {frame[:2], io.ErrUnexpectedEOF},
		"cut after length": {frame[:4], io.ErrUnexpectedEOF},
		"cut in body":      {frame[:len(frame)-1], io.ErrUnexpectedEOF},
		"length 0":         {length(0), ErrFrameLength},
		"length 4":         {append(length(4), frame...), ErrFrameLength},
		"too long":         {append(length(MaxLinkFrame+1), frame...), ErrFrameLength},
		"length -1":        {append(length(1<<32-1), frame...), ErrFrameLength},
		"claims 60 KiB":    {append(length(60<<10), frame...), io.ErrUnexpectedEOF},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f, err := NewReader(bytes.NewReader(tt.in), MaxLinkFrame).ReadFrame()
			if !errors.Is(err, tt.want) {
				t.Fatalf("error %v, want %v", err, tt.want)
			}
			if err == nil && (f.ID != 5 || f.Flags != FlagTerminal || string(f.Body) != "hello") {
				t.Errorf("frame %+v", f)
			}
		})
	}
}

func TestReaderLargeFrame(t *testing.T) {
	want := Frame{ID: 1, Body: bytes.Repeat([]byte("abc"), (MaxFrame-5)/3)}
	var buf bytes.Buffer
	if err := WriteFrame(&buf, want); err != nil {
		t.Fatal(err)
	}
	got, err := NewReader(&buf, MaxFrame).ReadFrame()
	if err != nil || !bytes.Equal(got.Body, want.Body) {
		t.Fatalf("%d bytes, %v", len(got.Body), err)
	}
	want.Body = make([]byte, MaxFrame)
	if err := WriteFrame(&buf, want); !errors.Is(err, ErrFrameLength) || buf.Len() != 0 {
		t.Errorf("frame beyond the limit: %v, %d bytes written", err, buf.Len())
	}
}

func TestFSOpWireForm(t *testing.T) {
	n := uint64(4096)
	tests := map[string]struct {
		op   FSOp
		diag string
	}{
		"stat":  {FSOp{Stat: &FSStat{Path: "/a", FollowSymlink: true}}, `{"op": {"Stat": {"path": "/a", "follow_symlink": true}}}`},
		"read":  {FSOp{Read: &FSTransfer{Handle: 3}}, `{"op": {"Read": {"handle": 3, "offset": 0, "len": null}}}`},
		"write": {FSOp{Write: &FSTransfer{Handle: 3, Len: &n}}, `{"op": {"Write": {"handle": 3, "offset": 0, "len": 4096}}}`},
		"mkdir": {FSOp{Mkdir: &FSMkdir{Path: "/d"}}, `{"op": {"Mkdir": {"path": "/d", "mode": null}}}`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := must(encMode.Marshal(FSRequest{Op: tt.op}))
			if got, err := cbor.Diagnose(b); err != nil || got != tt.diag {
				t.Errorf("%s, %v\nwant %s", got, err, tt.diag)
			}
			var back FSRequest
			if err := Unmarshal(b, &back); err != nil || back.Op.Check() != nil {
				t.Fatalf("Unmarshal: %v, Check: %v", err, back.Op.Check())
			}
			if d := cmp.Diff(tt.op, back.Op); d != "" {
				t.Error(d)
			}
		})
	}
	if (&FSOp{}).Check() == nil || (&FSOp{List: &FSPath{}, Remove: &FSPath{}}).Check() == nil {
		t.Error("Check accepts none or two operations")
	}
}

func TestDecodeRefuses(t *testing.T) {
	deep := append(bytes.Repeat([]byte{0x81}, 40), 0)
	tests := map[string][]byte{
		"empty":          {},
		"not a map":      {0x01},
		"no payload":     must(cbor.Marshal(map[string]any{"v": 7, "t": "x"})),
		"no type":        must(cbor.Marshal(map[string]any{"v": 7, "p": []byte{0xa0}})),
		"key twice":      append([]byte{0xa3}, bytes.Repeat([]byte{0x61, 'v', 0x07}, 3)...),
		"trailing bytes": append(MustEncode(MsgPing, nil), 0),
		"length beyond":  {0xa3, 0x61, 'v', 7, 0x61, 't', 0x7a, 0xff, 0xff, 0xff, 0xff},
		"deep nesting":   deep,
	}
	for name, b := range tests {
		if typ, _, _, err := Decode(b); err == nil {
			t.Errorf("%s: accepted as %q", name, typ)
		}
	}
	var x FSRequest
	if err := Unmarshal(deep, &x); err == nil {
		t.Error("Unmarshal accepts deep nesting")
	}
}

// FuzzDecode: the guest or a client owns these bytes. Decode may refuse them;
// it may not panic, and what it accepts the library must read the same way.
func FuzzDecode(f *testing.F) {
	f.Add(MustEncode(MsgPing, nil))
	f.Add(EncodeData(MsgStdout, []byte("x")))
	f.Add(MustEncode(MsgExec, Exec{Cmd: "/bin/true", Args: []string{"a"}}))
	f.Add(MustEncode(MsgFSRequest, FSRequest{Op: FSOp{Stat: &FSStat{Path: "/"}}}))
	f.Add([]byte{0xa3, 0x61, 'p', 0x5a, 0xff, 0xff, 0xff, 0xff})
	f.Add(must(cbor.Marshal(map[string]any{"v": 7, "t": "x", "p": []byte{0xa0}, "new": 1})))
	f.Fuzz(func(t *testing.T, b []byte) {
		typ, v, p, err := Decode(b)
		if err != nil {
			return
		}
		var e envelope
		if err := decMode.Unmarshal(b, &e); err != nil || e.T != typ || e.V != v || !bytes.Equal(e.P, p) {
			t.Fatalf("Decode(%x) = %q %d %x; library: %+v, %v", b, typ, v, p, e, err)
		}
		for _, x := range []any{&Exec{}, &Boot{}, &FSRequest{}, &FSResponse{}, &Credit{}, &Ready{}, &Hello{}, &ClientGone{}} {
			_ = Unmarshal(p, x)
		}
		d, err := DecodeData(p)
		var slow Data
		if slowErr := Unmarshal(p, &slow); (err == nil) != (slowErr == nil) || !bytes.Equal(d, slow.Data) {
			t.Fatalf("DecodeData(%x) = %x, %v; library %x, %v", p, d, err, slow.Data, slowErr)
		}
	})
}

// FuzzReader: the peer owns the stream. Frames that are accepted survive a
// round trip, and nothing panics or allocates beyond the limit.
func FuzzReader(f *testing.F) {
	f.Add(AppendFrame(nil, Frame{ID: 1, Flags: 2, Body: []byte("abc")}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte(strings.Repeat("\x00\x00\x00\x05\x00\x00\x00\x01\x00", 3)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, rest := NewReader(bytes.NewReader(b), MaxLinkFrame), b
		for {
			fr, err := r.ReadFrame()
			if err != nil {
				return
			}
			again := AppendFrame(nil, fr)
			if !bytes.HasPrefix(rest, again) {
				t.Fatalf("%+v does not encode to what was read", fr)
			}
			rest = rest[len(again):]
		}
	})
}
