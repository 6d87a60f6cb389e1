// NCCL between processes of one machine, as far as dev/ranks uses it: a message is a file, in a folder that the
// processes have in common. What a group sends goes at once when its turn in the stream comes, what it receives
// waits for that. As there, the n-th that a rank sends to another is the n-th that this one receives of it.
#ifndef EMULATE_NCCL_H
#define EMULATE_NCCL_H
#include <string>
#include <sys/stat.h>
#include "cuda_runtime.h"

enum ncclResult_t { ncclSuccess = 0, ncclInvalidUsage = 5, ncclInProgress = 7 };
enum ncclDataType_t { ncclFloat, ncclDouble };
struct ncclUniqueId { char internal[128]; };
struct ncclConfig_t { int maxCTAs; };
#define NCCL_CONFIG_INITIALIZER {0}

namespace emulate {
struct Communicator {
    std::string folder;
    int rank, ranks;
    std::vector<uint64_t> sent, received; // messages, of each other rank
};
struct Message { std::string path; char *at; size_t bytes; };
// What the group that is open sends and receives.
struct Group { int depth; cudaStream_t stream; std::vector<Message> out, in; };
inline Group group;

inline size_t bytes_of(size_t count, ncclDataType_t type) { return count * (type == ncclFloat ? 4 : 8); }
inline std::string message_name(const Communicator *all, int from, int to, uint64_t number) {
    return all->folder + "/" + std::to_string(from) + "." + std::to_string(to) + "." + std::to_string(number);
}
inline void send_message(const Message &m) {
    std::string begun = m.path + ".begun";
    FILE *file = fopen(begun.c_str(), "wb");
    if (!file || fwrite(m.at, 1, m.bytes, file) != m.bytes || fclose(file) || rename(begun.c_str(), m.path.c_str()))
        fault({"nccl.h", 0}, "%s cannot be written", m.path.c_str());
}
inline void receive_message(const Message &m) {
    FILE *file = fopen(m.path.c_str(), "rb");
    if (!file || fread(m.at, 1, m.bytes, file) != m.bytes || fgetc(file) != EOF)
        fault({"nccl.h", 0}, "%s is not of %zu bytes, as who receives it says", m.path.c_str(), m.bytes);
    fclose(file);
    unlink(m.path.c_str());
}
inline ncclResult_t add_message(std::vector<Message> &list, const Message &m, cudaStream_t stream) {
    if (!group.depth || !on_device(m.at, m.bytes) || stream->recorded) return ncclInvalidUsage;
    group.stream = stream;
    list.push_back(m);
    return ncclSuccess;
}
} // namespace emulate
typedef emulate::Communicator *ncclComm_t;

inline const char *ncclGetErrorString(ncclResult_t) { return "invalid usage"; }
inline ncclResult_t ncclGetVersion(int *version) {
    *version = 22800;
    return ncclSuccess;
}
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    const char *folder = getenv("TMPDIR");
    snprintf(id->internal, sizeof(id->internal), "%.100s/nccl_XXXXXX", folder ? folder : "/tmp");
    return mkdtemp(id->internal) ? ncclSuccess : ncclInvalidUsage;
}
inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *all, int ranks, ncclUniqueId id, int rank, ncclConfig_t *) {
    std::vector<uint64_t> none((size_t)ranks, 0);
    *all = new emulate::Communicator{id.internal, rank, ranks, none, none};
    return ncclSuccess;
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *problem) {
    *problem = ncclSuccess;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupStart(void) {
    emulate::group.depth++;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupEnd(void) {
    using namespace emulate;
    if (--group.depth || (group.out.empty() && group.in.empty())) return ncclSuccess;
    std::vector<Message> out = group.out, in = group.in;
    submit(group.stream, [=] { for (const Message &m : out) send_message(m); });
    submit(group.stream, [=] { for (const Message &m : in) receive_message(m); });
    group.stream->last->there = [=] {
        struct stat found;
        for (const Message &m : in) if (stat(m.path.c_str(), &found)) return 0;
        return 1;
    };
    group.out.clear();
    group.in.clear();
    return ncclSuccess;
}
inline ncclResult_t ncclSend(const void *at, size_t count, ncclDataType_t type, int peer, ncclComm_t all,
                             cudaStream_t stream) {
    using namespace emulate;
    std::string path = message_name(all, all->rank, peer, all->sent[(size_t)peer]++);
    return add_message(group.out, {path, (char *)(uintptr_t)at, bytes_of(count, type)}, stream);
}
inline ncclResult_t ncclRecv(void *at, size_t count, ncclDataType_t type, int peer, ncclComm_t all,
                             cudaStream_t stream) {
    using namespace emulate;
    std::string path = message_name(all, peer, all->rank, all->received[(size_t)peer]++);
    return add_message(group.in, {path, (char *)at, bytes_of(count, type)}, stream);
}
// Own numbers stand where they belong.
inline ncclResult_t ncclAllGather(const void *own, void *rows, size_t count, ncclDataType_t type, ncclComm_t all,
                                  cudaStream_t stream) {
    size_t bytes = emulate::bytes_of(count, type);
    if (own != (char *)rows + (size_t)all->rank * bytes) return ncclInvalidUsage;
    ncclResult_t code = ncclGroupStart();
    for (int r = 0; r < all->ranks && code == ncclSuccess; r++) {
        if (r == all->rank) continue;
        code = ncclSend(own, count, type, r, all, stream);
        if (code == ncclSuccess) code = ncclRecv((char *)rows + (size_t)r * bytes, count, type, r, all, stream);
    }
    ncclResult_t end = ncclGroupEnd();
    return code == ncclSuccess ? end : code;
}
#endif
