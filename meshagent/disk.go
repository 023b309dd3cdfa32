package meshagent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/daemon"
)

// What stands in the data directory.
const (
	keyFile   = "agent.key"  // PKCS#8, PEM
	knownFile = "agent.json" // known
)

// known is what an agent needs to find and believe its CA again after a restart:
// one file, so that its parts always belong together. It holds no secret.
type known struct {
	Certificates [][]byte `json:"certificates"`          // the agent's own SVID, DER, leaf first
	Bundle       []byte   `json:"bundle"`                // of the own domain, SPIFFE JSON
	Cluster      []byte   `json:"cluster"`               // statev1.Cluster
	Members      [][]byte `json:"members"`               // statev1.Member each
	RecoveryKey  []byte   `json:"recoveryKey,omitempty"` // of the cluster, pinned
	Confirmed    [][]byte `json:"confirmed,omitempty"`   // statev1.Member each, of the last table that two CA nodes agreed on

	cluster            *statev1.Cluster
	members, confirmed []*statev1.Member
}

// memory is what an agent knows of its CA, in the process and on the disk.
type memory struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	known *known // immutable
}

// openMemory reads what was known when the agent last ran.
func openMemory(dir string, log *slog.Logger) (*memory, error) {
	k, err := load(dir)
	if err != nil {
		return nil, err
	}
	return &memory{dir: dir, log: log, known: k}, nil
}

// now is what is known at this moment.
func (m *memory) now() *known {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.known
}

// keep changes what is known, and what stands on the disk when that differs. A full disk
// stops nothing: what is in the process is what counts.
func (m *memory) keep(change func(*known)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := *m.known
	change(&next)
	if next.equal(m.known) {
		return
	}
	m.known = &next
	if err := next.save(m.dir); err != nil {
		m.log.Error("a restart would not know what the agent knows now", "error", err)
	}
}

// load reads what was known. Nothing at all is known on a new host. A damaged file
// is an error: without a pin nobody could tell a CA node from an impostor.
func load(dir string) (*known, error) {
	path := filepath.Join(dir, knownFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &known{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read what the agent knew of its CA: %w", err)
	}
	k := &known{}
	damaged := func(err error) (*known, error) {
		return nil, fmt.Errorf("%s is damaged (delete it, and start the agent with a join token): %w", path, err)
	}
	if err := json.Unmarshal(data, k); err != nil {
		return damaged(err)
	}
	k.cluster = &statev1.Cluster{}
	if err := proto.Unmarshal(k.Cluster, k.cluster); err != nil {
		return damaged(err)
	}
	for _, table := range []struct {
		records [][]byte
		into    *[]*statev1.Member
	}{{k.Members, &k.members}, {k.Confirmed, &k.confirmed}} {
		for _, record := range table.records {
			m := &statev1.Member{}
			if err := proto.Unmarshal(record, m); err != nil {
				return damaged(err)
			}
			*table.into = append(*table.into, m)
		}
	}
	return k, nil
}

func (k *known) save(dir string) error {
	var err error
	if k.Cluster, err = proto.Marshal(k.cluster); err != nil {
		return fmt.Errorf("cannot keep what the agent knows of its CA: %w", err)
	}
	k.Members, k.Confirmed = nil, nil
	for _, table := range []struct {
		members []*statev1.Member
		into    *[][]byte
	}{{k.members, &k.Members}, {k.confirmed, &k.Confirmed}} {
		for _, m := range table.members {
			record, err := proto.Marshal(m)
			if err != nil {
				return fmt.Errorf("cannot keep what the agent knows of its CA: %w", err)
			}
			*table.into = append(*table.into, record)
		}
	}
	data, err := json.Marshal(k)
	if err != nil {
		return fmt.Errorf("cannot keep what the agent knows of its CA: %w", err)
	}
	if err := daemon.WriteFileAtomic(filepath.Join(dir, knownFile), data, 0o600); err != nil {
		return fmt.Errorf("cannot keep what the agent knows of its CA: %w", err)
	}
	return nil
}

// equal compares what was set, not what save derives from it.
func (k *known) equal(o *known) bool {
	return slices.EqualFunc(k.Certificates, o.Certificates, bytes.Equal) &&
		bytes.Equal(k.Bundle, o.Bundle) && bytes.Equal(k.RecoveryKey, o.RecoveryKey) &&
		proto.Equal(k.cluster, o.cluster) &&
		sameMembers(k.members, o.members) && sameMembers(k.confirmed, o.confirmed)
}

func sameMembers(a, b []*statev1.Member) bool {
	return slices.EqualFunc(a, b, func(a, b *statev1.Member) bool { return proto.Equal(a, b) })
}

func keyPath(dir string) string { return filepath.Join(dir, keyFile) }
