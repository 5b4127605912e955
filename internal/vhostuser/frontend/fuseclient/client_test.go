package fuseclient

import (
	"errors"
	"syscall"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// TestCheckReply: what Linux 7.1 answers with EIO is an error here too.
func TestCheckReply(t *testing.T) {
	m := &Client{}
	request := m.Header(fusewire.OpGetattr, 1, 16)
	var h fusewire.InHeader
	fusewire.Decode(request, &h)
	tests := map[string]struct {
		out  fusewire.OutHeader
		body int
		want error // nil: any that is no Errno
		ok   bool
	}{
		"good":           {fusewire.OutHeader{Len: 20, Unique: h.Unique}, 4, nil, true},
		"errno":          {fusewire.OutHeader{Len: 16, Error: -2, Unique: h.Unique}, 0, syscall.ENOENT, false},
		"wrong length":   {fusewire.OutHeader{Len: 16, Unique: h.Unique}, 4, nil, false},
		"wrong unique":   {fusewire.OutHeader{Len: 16, Unique: h.Unique + 2}, 0, nil, false},
		"positive":       {fusewire.OutHeader{Len: 16, Error: 2, Unique: h.Unique}, 0, nil, false},
		"error and body": {fusewire.OutHeader{Len: 20, Error: -2, Unique: h.Unique}, 4, nil, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			reply := append(fusewire.Append(nil, &tt.out), make([]byte, tt.body)...)
			body, err := checkReply(request, reply)
			var errno syscall.Errno
			switch {
			case tt.ok && (err != nil || len(body) != tt.body):
				t.Errorf("got %d bytes, %v", len(body), err)
			case !tt.ok && err == nil:
				t.Error("accepted")
			case tt.want != nil && !errors.Is(err, tt.want):
				t.Errorf("error %v, want %v", err, tt.want)
			case !tt.ok && tt.want == nil && errors.As(err, &errno):
				t.Errorf("error %v is the server's", err)
			}
		})
	}
	if _, err := checkReply(request, make([]byte, 15)); err == nil {
		t.Error("short reply accepted")
	}
}

func TestEntries(t *testing.T) {
	b := make([]byte, 200)
	n := fusewire.PutDirent(b, &fusewire.Dirent{Ino: 7, Off: 1, Namelen: 3, Type: 8}, []byte("abc"))
	n += fusewire.PutDirent(b[n:], &fusewire.Dirent{Ino: 8, Off: 2, Namelen: 8, Type: 4}, []byte("12345678"))
	list, err := Entries(b[:n], false)
	if err != nil || len(list) != 2 || list[0].Name != "abc" || list[1].Name != "12345678" {
		t.Errorf("entries %+v, %v", list, err)
	}
	if _, err := Entries(b[:n-8], false); err == nil {
		t.Error("cut listing accepted")
	}
}
