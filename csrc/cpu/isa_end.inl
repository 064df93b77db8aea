// Ends what isa_begin.inl began.
#if defined(NATRPB_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
