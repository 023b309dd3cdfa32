package scenarios

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/entente-mesh/entente/internal/daemon"
)

// Session tells other commands of this user where a demo that was kept up can be
// reached, so that they need no flags.
type Session struct {
	PID     int             `json:"pid"`
	Domains []SessionDomain `json:"domains"`
}

// SessionDomain is one trust domain of it.
type SessionDomain struct {
	Name   string   `json:"name"`
	CA     []string `json:"ca"`     // admin sockets of its CA nodes
	Agents []string `json:"agents"` // admin sockets of its agents
}

// sessionFile stands in a directory that only this user can write: what it names is
// trusted with commands.
func sessionFile() (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = filepath.Join(os.TempDir(), "entente-"+strconv.Itoa(os.Getuid()))
	} else {
		dir = filepath.Join(dir, "entente")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(st.Uid) != os.Getuid() || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%s is not a directory that only you can write: remove it", dir)
	}
	return filepath.Join(dir, "demo.json"), nil
}

// ReadSession returns the session of the demo that this user keeps up; an error that
// is fs.ErrNotExist if there is none.
func ReadSession() (*Session, error) {
	file, err := sessionFile()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	s := &Session{}
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if process, err := os.FindProcess(s.PID); err != nil || process.Signal(syscall.Signal(0)) != nil {
		return nil, fmt.Errorf("the demo of %s has ended: %w", file, fs.ErrNotExist)
	}
	return s, nil
}

// announce writes the session of this world; forget takes it back, unless another
// demo has put its own there.
func (w *world) announce() (forget func() error, err error) {
	file, err := sessionFile()
	if err != nil {
		return nil, err
	}
	s := Session{PID: os.Getpid()}
	for i := range w.spec.TrustDomains {
		td := &w.spec.TrustDomains[i]
		domain := SessionDomain{Name: td.Name}
		for _, dc := range td.CA {
			domain.CA = append(domain.CA, w.find(kindCA, td.Name, dc).socket)
		}
		for _, dc := range td.Mesh {
			domain.Agents = append(domain.Agents, w.find(kindAgent, td.Name, dc).adminSocket())
		}
		s.Domains = append(s.Domains, domain)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if err := daemon.WriteFileAtomic(file, text, 0o600); err != nil {
		return nil, err
	}
	return func() error {
		if now, err := ReadSession(); err == nil && now.PID == s.PID {
			if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			_ = os.Remove(filepath.Dir(file)) // stays if another demo uses it
		}
		return nil
	}, nil
}
