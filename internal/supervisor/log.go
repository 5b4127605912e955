package supervisor

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// File names in a sandbox's logs directory.
const (
	OutputLog     = "output.jsonl"   // what programs printed
	ConsoleLog    = "console.log"    // the guest kernel's serial console
	SupervisorLog = "supervisor.log" // supervisor, VMM and file server
)

// maxLogBytes bounds output.jsonl; the full file becomes output.jsonl.1.
const maxLogBytes = 16 << 20

// LogLine is one line of output.jsonl, in the peer's form.
type LogLine struct {
	Time     string `json:"t"` // RFC 3339, nanoseconds, UTC
	Source   string `json:"s"` // stdout, stderr, system
	Data     string `json:"d"`
	ID       uint32 `json:"id"`          // session
	Encoding string `json:"e,omitempty"` // "b64" when Data is not UTF-8
}

// outputLog appends to output.jsonl. A log that cannot be written loses lines,
// never the sandbox.
type outputLog struct {
	dir string

	mu   sync.Mutex
	f    *os.File // guarded by mu
	size int64    // guarded by mu
}

func openOutputLog(dir string) (*outputLog, error) {
	l := &outputLog{dir: dir}
	return l, l.reopen()
}

func (l *outputLog) reopen() error {
	f, err := home.OpenFile(filepath.Join(l.dir, OutputLog), unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, fi.Size()
	return nil
}

// output logs the payload of a stdout or stderr frame.
func (l *outputLog) output(id uint32, msgType string, payload []byte) {
	data, err := agentproto.DecodeData(payload)
	if err != nil || len(data) == 0 {
		return
	}
	source := "stdout"
	if msgType == agentproto.MsgStderr {
		source = "stderr"
	}
	l.write(source, id, data)
}

// system logs an event of the sandbox itself.
func (l *outputLog) system(text string) { l.write("system", 0, []byte(text+"\n")) }

func (l *outputLog) write(source string, id uint32, data []byte) {
	line := LogLine{Time: time.Now().UTC().Format(time.RFC3339Nano), Source: source, Data: string(data), ID: id}
	if !utf8.Valid(data) {
		line.Data, line.Encoding = base64.StdEncoding.EncodeToString(data), "b64"
	}
	b, err := json.Marshal(line)
	if err != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	if l.size+int64(len(b)) > maxLogBytes {
		l.rotate()
	}
	n, _ := l.f.Write(append(b, '\n'))
	l.size += int64(n)
}

// rotate starts a new file; l.mu is held. If that fails the old one goes on.
func (l *outputLog) rotate() {
	path := filepath.Join(l.dir, OutputLog)
	if err := os.Rename(path, path+".1"); err != nil {
		l.size = 0
		return
	}
	old := l.f
	if err := l.reopen(); err == nil {
		old.Close()
	}
}

func (l *outputLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

// Text returns the bytes a line stands for.
func (l LogLine) Text() []byte {
	if l.Encoding == "b64" {
		if b, err := base64.StdEncoding.DecodeString(l.Data); err == nil {
			return b
		}
	}
	return []byte(l.Data)
}
