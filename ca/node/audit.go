package node

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/daemon"
)

// raftRoom is what the replicated log keeps for itself where the audit log is on its file
// system: so much, or this part of a small one.
const (
	raftRoom     = 1 << 30
	raftRoomPart = 20
)

// auditing is where the audit log is.
type auditing struct {
	*core
	file   *daemon.LogFile // nil: not to a file
	shares bool            // it is on the file system of the replicated log
}

// open opens the audit log.
func (a *auditing) open(registry *daemon.Metrics) error {
	cfg := a.cfg.Audit
	switch cfg.File {
	case "off":
		return nil
	case "stderr":
		a.audit = server.NewAudit(os.Stderr, a.cfg.Name, cfg.Required, a.log, registry)
		return nil
	}
	bound := daemon.LogBound{Bytes: cfg.MaxSize.Bytes}
	// The file may be a link to another file system, and is not there yet at first.
	at := cfg.File
	if _, err := os.Stat(at); err != nil {
		at = filepath.Dir(cfg.File)
	}
	a.shares = daemon.SameDisk(at, a.cfg.DataDir)
	if a.shares {
		bound.Free = func() (free, others uint64) {
			free, size, err := daemon.DiskSpace(a.cfg.DataDir)
			if err != nil {
				return 1 << 62, 0 // not known: the bound alone counts
			}
			return free, min(raftRoom, size/raftRoomPart)
		}
	}
	file, err := daemon.OpenLogFile(cfg.File, 0o600, bound)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if a.shares && !a.cfg.Keys.InsecureDev {
		a.log.Warn("the audit log is on the file system of the replicated log: put it on another one (audit.file), so that neither takes the other's room", "file", cfg.File)
	}
	a.file = file
	a.audit = server.NewAudit(file, a.cfg.Name, cfg.Required, a.log, registry)
	gauge := func(name, help string, value func() float64) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("entente_ca_audit_file_bytes", "Size of the audit log with its rotated files.", func() float64 { return float64(file.Size()) })
	gauge("entente_ca_audit_file_limit_bytes", "Bound of that size (audit.maxSize).", func() float64 { return float64(cfg.MaxSize.Bytes) })
	gauge("entente_ca_audit_shares_raft_disk", "1 if the audit log is on the file system of the replicated log.", func() float64 {
		if a.shares {
			return 1
		}
		return 0
	})
	gauge("entente_ca_audit_degraded", "1 if SVIDs are counted in the audit log instead of recorded one by one, or acts are missing.", func() float64 {
		if a.audit.Problem() != nil {
			return 1
		}
		return 0
	})
	return nil
}

func (a *auditing) status() server.AuditLog {
	status := server.AuditLog{File: a.cfg.Audit.File, SharesRaft: a.shares}
	if a.file != nil {
		status.Bytes, status.Bound = a.file.Size(), a.cfg.Audit.MaxSize.Bytes
	}
	if err := a.audit.Problem(); err != nil {
		status.Problem = err.Error()
	}
	return status
}
