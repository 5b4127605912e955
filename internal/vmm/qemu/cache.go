package qemu

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// bootCache keeps one fact about this boot of the host in a file. A cache that
// cannot be read or written only costs time.
type bootCache struct{ dir, name string }

type cached struct {
	Boot  string          `json:"boot_id"`
	Value json.RawMessage `json:"value"`
}

func (c bootCache) path() string { return filepath.Join(c.dir, "."+c.name+".json") }

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// load reports whether the fact is known for this boot.
func (c bootCache) load(v any) bool {
	if c.dir == "" {
		return false
	}
	b, err := home.ReadFile(c.path())
	if err != nil {
		return false
	}
	var f cached
	id := bootID()
	return json.Unmarshal(b, &f) == nil && id != "" && f.Boot == id && json.Unmarshal(f.Value, v) == nil
}

func (c bootCache) store(v any) {
	if c.dir == "" {
		return
	}
	value, err := json.Marshal(v)
	if err != nil {
		return
	}
	b, err := json.Marshal(cached{Boot: bootID(), Value: value})
	if err != nil {
		return
	}
	tmp, err := os.CreateTemp(c.dir, "."+c.name+"-*")
	if err != nil {
		return
	}
	_, err = tmp.Write(b)
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil || os.Rename(tmp.Name(), c.path()) != nil {
		os.Remove(tmp.Name())
	}
}
