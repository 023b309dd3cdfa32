package domain

import (
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// A change of the catalogue that no log entry holds comes in parts, which are put aside
// and mean nothing until one command names them all; that one is judged like any other,
// with its if_revision. Who dies between leaves parts behind for a while.

const (
	stageIDSize = 16
	stagedLife  = 10 * time.Minute
	maxStaged   = 16 << 20 // bytes of all parts together
	maxParts    = 4096     // of one change
)

func stageKey(id []byte, part uint32) string {
	return fmt.Sprintf("%s/%d", hex.EncodeToString(id), part)
}

func stagedKey(s *statev1.Staged) string { return stageKey(s.GetId(), s.GetPart()) }

func (a *application) stageObjects(c *statev1.StageObjects) *Refusal {
	if len(c.GetId()) != stageIDSize || c.GetPart() >= maxParts {
		return refuse(CodeInvalid, "a staged change has an id of %d bytes and at most %d parts", stageIDSize, maxParts)
	}
	if len(c.GetObjects().GetUpserts())+len(c.GetObjects().GetDeletes()) == 0 {
		return refuse(CodeInvalid, "a part of a staged change holds nothing")
	}
	key := stageKey(c.GetId(), c.GetPart())
	if have, ok := a.staged.get(key); ok {
		if proto.Equal(have.GetObjects(), c.GetObjects()) {
			return nil // the proposer did not hear the first answer
		}
		return refuse(CodeExists, "part %d of this staged change is something else", c.GetPart())
	}
	size := proto.Size(c)
	if a.stagedBytes+size > maxStaged {
		return refuse(CodeLimit, "changes of the catalogue that are put aside have over %d bytes: repeat when others have ended, or change less at once", maxStaged)
	}
	if refusal := a.roomForStaged(size); refusal != nil {
		return refusal
	}
	part := &statev1.Staged{Id: c.GetId(), Part: c.GetPart(), Objects: c.GetObjects()}
	if a.hardened() {
		part.Owner = a.principal
	}
	if a.now != 0 {
		part.NotAfter = a.Now().Add(stagedLife).Unix()
	}
	put(a, &a.staged, key, part)
	a.stagedBytes += size
	return nil
}

func (a *application) applyStaged(c *statev1.ApplyStaged) *Refusal {
	if c.GetParts() == 0 {
		a.unstage(func(s *statev1.Staged) bool {
			return string(s.GetId()) == string(c.GetId()) && a.stagedBy(s, a.principal)
		})
		return nil
	}
	if c.GetParts() > maxParts {
		return refuse(CodeInvalid, "a staged change has at most %d parts", maxParts)
	}
	whole, refusal := a.staging(c, a.principal)
	if refusal != nil {
		return refusal
	}
	if refusal := a.applyObjects(whole); refusal != nil {
		return refusal
	}
	a.unstage(func(s *statev1.Staged) bool { return string(s.GetId()) == string(c.GetId()) })
	return nil
}

// staging is a staged change as a whole, or as far as it is there.
func (s *State) staging(c *statev1.ApplyStaged, principal string) (whole *statev1.ApplyObjects, refusal *Refusal) {
	whole = &statev1.ApplyObjects{}
	for part := range min(c.GetParts(), maxParts) {
		staged, ok := s.staged.get(stageKey(c.GetId(), part))
		if !ok || !s.stagedBy(staged, principal) {
			return whole, refuse(CodeNotFound, "part %d of %d of the staged change is not there any more: repeat all of it", part+1, c.GetParts())
		}
		whole.Upserts = append(whole.Upserts, staged.GetObjects().GetUpserts()...)
		whole.Deletes = append(whole.Deletes, staged.GetObjects().GetDeletes()...)
	}
	return whole, nil
}

// stagedBy tells whether a part is that administrator's. Below the hardened level parts had
// no owner.
func (s *State) stagedBy(part *statev1.Staged, principal string) bool {
	return !s.hardened() || part.GetOwner() == principal
}

func (a *application) unstage(which func(*statev1.Staged) bool) {
	for _, s := range slices.Clone(a.staged.rows) {
		if which(s) {
			drop(a, &a.staged, stagedKey(s))
			a.stagedBytes -= stagedSize(s)
		}
	}
}

// forgetStaged drops what nobody came back for. What was put aside before the first Tick
// is old at the second.
func (a *application) forgetStaged() {
	now := a.Now().Unix()
	a.unstage(func(s *statev1.Staged) bool { return s.GetNotAfter() < now })
}

// stagedSize is what a part counts.
func stagedSize(s *statev1.Staged) int {
	return proto.Size(&statev1.StageObjects{Id: s.GetId(), Part: s.GetPart(), Objects: s.GetObjects()})
}
